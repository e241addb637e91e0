//! The result of a program: files, logits, and how it ends.

use std::any::Any;
use std::error::Error;
use std::ffi::OsString;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use models::{CheckpointError, CheckpointFormat, Pretrained};
use peft::failed_allocation;
use tensor_files::Output;

use crate::{console, interrupt};

/// A result of an example.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Runs a program, prints its error with all causes, and returns its exit code. A device that runs out of memory,
/// which burn reports by a panic wherever a tensor is read, is an error.
pub fn exit(run: impl FnOnce() -> Result<()>) -> ExitCode {
    let ended = interrupt::watch().map_err(Into::into);
    let runs_on = thread::current().id();
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let is_told = thread::current().id() == runs_on && of_memory(panic.payload()).is_some();
        if !is_told {
            print(panic);
        }
    }));
    let ended = ended.and_then(|()| of_device(run));
    interrupt::wait_if_ending();
    let printed = match console::failure() {
        Some(error) => Err(format!("the standard output is incomplete: {error}").into()),
        None => Ok(()),
    };
    match ended.and(printed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::eprintln!("error: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Runs with a panic for want of memory on a device as an error.
fn of_device(run: impl FnOnce() -> Result<()>) -> Result<()> {
    let ended = panic::catch_unwind(AssertUnwindSafe(run));
    ended.unwrap_or_else(|panic| match of_memory(&*panic) {
        Some(n_bytes) => Err(format!(
            "the device has no memory for {n_bytes} more bytes; take smaller batches or shorter texts, or \
             compute in 16 bits"
        )
        .into()),
        None => panic::resume_unwind(panic),
    })
}

/// The bytes that a device had no memory for, if that is what a panic says.
fn of_memory(panic: &dyn Any) -> Option<u64> {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    failed_allocation(text?)
}

/// The message of an error and of its causes.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Saves a model in `format`, or beside it in the format of this workspace if `format` cannot hold its
/// values.
///
/// Returns where it was saved, and an error that says why not as asked.
///
/// # Errors
/// If it cannot be saved.
pub fn save_as(
    lm: &Pretrained,
    output: Output,
    format: CheckpointFormat,
) -> models::Result<(PathBuf, Option<models::Error>)> {
    let dir = output.dir().to_path_buf();
    let refusal = match models::save_as(lm, output, format) {
        Err(error @ models::Error::Checkpoint(CheckpointError::CannotHold { .. })) => error,
        saved => return saved.map(|()| (dir, None)),
    };
    let beside = (1..).map(|n| {
        let mut name = OsString::from(dir.file_name().unwrap_or_default());
        name.push("-quant-core");
        if n > 1 {
            name.push(format!("-{n}"));
        }
        interrupt::reserve(&dir.with_file_name(name))
    });
    let mut free = beside.filter(|place| {
        use tensor_files::Error::{OutputBusy, OutputExists};
        !matches!(place, Err(OutputBusy { .. } | OutputExists { .. }))
    });
    let output = free.next().expect("numbers do not end")?;
    let dir = output.dir().to_path_buf();
    models::save(lm, output)?;
    Ok((dir, Some(refusal)))
}

/// The bytes of all safetensors and GGUF files in a directory.
///
/// # Errors
/// If it cannot be read.
pub fn weights_bytes(dir: &Path) -> tensor_files::Result<u64> {
    let n_bytes = || -> std::io::Result<u64> {
        let mut n_bytes = 0;
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|of| of == "safetensors" || of == "gguf")
            {
                n_bytes += std::fs::metadata(path)?.len();
            }
        }
        Ok(n_bytes)
    };
    n_bytes().map_err(|cause| tensor_files::Error::Io {
        path: dir.into(),
        cause,
    })
}

/// The command that goes on with this run of so many processes, for a shell.
pub fn resume_command(n_processes: usize) -> String {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let mut words: Vec<String> = words.collect();
    if !words.iter().any(|word| word == "--resume") {
        words.push("--resume".into());
    }
    if n_processes > 1 {
        let mpirun = ["mpirun".into(), "-np".into(), n_processes.to_string()];
        words.splice(0..0, mpirun);
    }
    // The system has no arguments that cannot be quoted.
    shlex::try_join(words.iter().map(String::as_str)).unwrap_or_default()
}

/// Writes files of these names and contents.
///
/// # Errors
/// If one cannot be written.
pub fn write_files(output: Output, files: &[(&str, String)]) -> tensor_files::Result<()> {
    output.write(|dir| {
        let mut files = files.iter();
        files.try_for_each(|(name, text)| tensor_files::write(&dir.join(name), text.as_bytes()))
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_memory_is_an_error() {
        let error = of_device(|| panic!("failed: out of device memory allocating {} bytes", 4096));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("no memory for 4096 more bytes"), "{error}");
        assert!(of_device(|| Ok(())).is_ok());
        let other = panic::catch_unwind(|| of_device(|| panic!("another")));
        assert_eq!(other.unwrap_err().downcast_ref(), Some(&"another"));
    }
}
