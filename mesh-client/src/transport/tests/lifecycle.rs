//! Limits, GOAWAY, keepalive, drain.
