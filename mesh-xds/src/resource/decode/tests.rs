//! Decoding: each rule of acceptance and rejection.
