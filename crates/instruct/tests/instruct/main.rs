//! Files of records, templates, examples and rows that are refused, and other programs.

mod examples;
#[cfg(unix)]
mod files;
mod interop;
mod rows;
