//! The benches are in `*.rs` beside this folder: `cargo bench --package benches`.
