//! The graph: reachability, completeness and what is published when.
