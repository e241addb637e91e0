//! The result of a program: files, logits, and how it ends.

use std::path::Path;
use std::process::ExitCode;

/// A result of an example.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Prints an error with all its causes, and returns the exit code of the program.
pub fn exit(result: Result<()>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    eprint!("error: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprint!(": {error}");
        cause = error.source();
    }
    eprintln!();
    ExitCode::FAILURE
}

/// The bytes of all safetensors files in a directory.
///
/// # Errors
/// If it cannot be read.
pub fn weights_bytes(dir: &Path) -> Result<u64> {
    let mut n_bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if path.extension().is_some_and(|of| of == "safetensors") {
            n_bytes += entry.metadata()?.len();
        }
    }
    Ok(n_bytes)
}

/// Writes files of these names and contents into a new directory.
///
/// # Errors
/// If the directory exists, or a file cannot be written.
pub fn write_files(dir: &Path, files: &[(&str, String)]) -> Result<()> {
    tensor_files::write_directory(dir, |dir| {
        files.iter().try_for_each(|(name, text)| {
            let path = dir.join(name);
            std::fs::write(&path, text).map_err(|source| tensor_files::Error::Io { path, source })
        })
    })?;
    Ok(())
}

/// The bits of each value.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The largest difference of two values; infinite if it is not a number.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    let differences = a.iter().zip(b).map(|(a, b)| {
        let difference = (a - b).abs();
        if a.to_bits() == b.to_bits() {
            0.0
        } else if difference.is_nan() {
            f32::INFINITY
        } else {
            difference
        }
    });
    differences.fold(0.0, f32::max)
}
