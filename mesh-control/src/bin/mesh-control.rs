//! The mini control plane as a program: see `mesh-control --help`.

fn main() -> std::process::ExitCode {
    mesh_control::cli::main()
}
