//! Requests and responses over HTTP/1.1.
