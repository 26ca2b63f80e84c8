//! Bootstrap: what is read, what is refused, and what the error says.
