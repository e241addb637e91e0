//! What the programs print.
//!
//! The macros are those of the standard library, but an error of writing does not end the program: a
//! reader that closes its pipe, as `head` does, loses no model. Bars are out of the way meanwhile.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::progress;

/// Prints to the standard output.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::console::print(format_args!($($arg)*)) };
}

/// Prints a line to the standard output.
#[macro_export]
macro_rules! println {
    () => { $crate::console::print(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::console::print(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Prints a line to the standard error.
#[macro_export]
macro_rules! eprintln {
    ($($arg:tt)*) => { $crate::console::print_error(format_args!($($arg)*)) };
}

static FAILED: OnceLock<io::Error> = OnceLock::new();

static IS_SILENT: AtomicBool = AtomicBool::new(false);

/// Prints nothing to the standard output from now on.
pub fn silence() {
    IS_SILENT.store(true, Ordering::Relaxed);
}

/// Prints to the standard output, at once.
pub fn print(text: Arguments) {
    if IS_SILENT.load(Ordering::Relaxed) {
        return;
    }
    let printed = progress::hidden(|| {
        let mut out = io::stdout().lock();
        out.write_fmt(text).and_then(|()| out.flush())
    });
    if let Err(error) = printed
        && error.kind() != ErrorKind::BrokenPipe
    {
        FAILED.get_or_init(|| error);
    }
}

/// Prints a line to the standard error.
pub fn print_error(line: Arguments) {
    // There is no other place to say that it is closed.
    let _ = progress::hidden(|| io::stderr().lock().write_fmt(format_args!("{line}\n")));
}

/// The first error of the standard output, unless its reader closed it.
pub fn failure() -> Option<&'static io::Error> {
    FAILED.get()
}
