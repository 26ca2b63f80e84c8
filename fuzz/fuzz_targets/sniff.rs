//! The target `sniff` of `mesh_client::fuzz_api`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_client::fuzz_api::sniff(data));
