//! Reads a model of any format and writes it in the format of this workspace.
//!
//! `cargo run --release --package quant-models --example resave -- FROM TO`

use burn::tensor::Device;
use models::{load, save};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dirs: Vec<_> = std::env::args_os().skip(1).collect();
    let [from, to] = &dirs[..] else {
        return Err("give two directories, one with a model and a new one".into());
    };
    Ok(save(&load(from, &Device::flex())?, to)?)
}
