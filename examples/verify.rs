//! Checks that a directory is the model that was saved there, and the one that its certificate is for.
//!
//! `cargo run --release --example verify -- DIR` says what agrees, or the first difference.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use examples::device::DeviceArg;
use examples::outcome::{Result, exit};
use examples::println;
use peft::Certificate;

/// Check the files of a saved model and its certificate
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Examples:
  verify Llama-2-7b-4bit-task/4-bit
  verify Llama-2-7b-4bit-task/4-bit --certificate kept/certificate.json

The list of files and the certificate are not signed: sign SHA256SUMS, or keep the certificate elsewhere."
)]
struct Args {
    /// Directory of the model
    dir: PathBuf,
    /// Certificate from elsewhere, in the place of the directory's own
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArg,
}

fn main() -> ExitCode {
    exit(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    // Before the model, which takes longer to read.
    let other = args.certificate.as_ref().map(Certificate::load);
    let other = other.transpose()?;
    let lm = models::load_verified(&args.dir, &args.device.open())?;
    println!("files: those that {} lists", tensor_files::SUMS);
    if let Some(certificate) = &other {
        certificate.verify(&lm.model)?;
    }
    match other.or(lm.certificate) {
        Some(certificate) => println!("certificate: {certificate}"),
        None => println!("certificate: none; no merge is known of"),
    }
    Ok(())
}
