//! Signals that end a program: a save under way is finished, and what is half made is removed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use tempfile::TempDir;
use tensor_files::{Canceler, Output};

/// Whether a signal is ending the program.
static IS_ENDING: AtomicBool = AtomicBool::new(false);

/// What a signal says at the end.
static SAID: Mutex<String> = Mutex::new(String::new());

/// What a signal removes.
static MADE: Mutex<Made> = Mutex::new(Made {
    outputs: Vec::new(),
    scratch: Vec::new(),
});

struct Made {
    outputs: Vec<Canceler>,
    scratch: Vec<PathBuf>,
}

fn made() -> MutexGuard<'static, Made> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reserves the place of an output.
///
/// # Errors
/// If it is not free, or nothing can be written there.
pub fn reserve(dir: &Path) -> tensor_files::Result<Output> {
    let mut made = made();
    let output = Output::reserve(dir)?;
    made.outputs.push(output.canceler());
    Ok(output)
}

/// Makes a directory for temporary files, which is removed when it is dropped.
///
/// # Errors
/// If it cannot be made.
pub fn scratch() -> io::Result<TempDir> {
    let mut made = made();
    let dir = tempfile::tempdir()?;
    made.scratch.push(dir.path().into());
    Ok(dir)
}

/// Removes a directory at the end of a program by a signal, unless it is to be [kept](keep).
pub fn discard(dir: &Path) {
    made().scratch.push(dir.into());
}

/// Keeps a directory that was to be removed.
pub fn keep(dir: &Path) {
    made().scratch.retain(|of| of != dir);
}

/// Prints a line on the standard error where a signal ends the program.
pub fn on_end(line: &str) {
    *SAID.lock().unwrap_or_else(PoisonError::into_inner) = line.into();
}

/// Saves what is not reserved: a signal waits for its end. `save` must not call [`reserve`].
pub fn uninterrupted<T>(save: impl FnOnce() -> T) -> T {
    let _made = made();
    save()
}

/// Whether a signal is ending the program, which waits for [`uninterrupted`] work.
pub fn is_ending() -> bool {
    IS_ENDING.load(Ordering::SeqCst)
}

/// Leaves the end of the program to a signal that is ending it.
pub fn wait_if_ending() {
    while is_ending() {
        thread::park();
    }
}

/// Lets SIGINT and SIGTERM end the program with 130 and 143, once a save under way is finished and all
/// else that is half made is removed. The second signal ends it at once.
///
/// # Errors
/// If the signals cannot be received.
#[cfg(unix)]
pub fn watch() -> io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;
    use signal_hook::low_level::exit;

    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::spawn(move || {
        let mut signals = signals.forever();
        let Some(signal) = signals.next() else { return };
        IS_ENDING.store(true, Ordering::SeqCst);
        thread::spawn(move || {
            if MADE.try_lock().is_err() {
                crate::eprintln!("\nending when this is saved; a second signal ends at once");
            }
            end();
            let said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
            if !said.is_empty() {
                crate::eprintln!("\n{said}");
            }
            // The threads that compute are in the middle of something: no destructor can be run.
            exit(128 + signal)
        });
        if let Some(signal) = signals.next() {
            exit(128 + signal)
        }
    });
    Ok(())
}

/// Waits for the saves under way and removes the rest. Nothing can be made after it.
#[cfg(unix)]
fn end() {
    let made = loop {
        let mut made = made();
        let outputs = std::mem::take(&mut made.outputs);
        if outputs.is_empty() {
            break made;
        }
        // Those that are being written may reserve others.
        drop(made);
        outputs.iter().for_each(Canceler::cancel);
    };
    for dir in &made.scratch {
        // The computation may add files meanwhile, and make the directory again: it is gone when there
        // is none to remove.
        let is_gone = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
        let mut attempts = 0..100;
        while !std::fs::remove_dir_all(dir).is_err_and(is_gone) && attempts.next().is_some() {}
    }
    std::mem::forget(made);
}

/// Elsewhere signals end the program as they do.
///
/// # Errors
/// None.
#[cfg(not(unix))]
pub fn watch() -> io::Result<()> {
    Ok(())
}
