//! The protocol core against a scripted control plane, on virtual time.
