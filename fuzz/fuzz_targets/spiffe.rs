//! The target `spiffe` of `mesh_client::fuzz_api`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_client::fuzz_api::spiffe(data));
