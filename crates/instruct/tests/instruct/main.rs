//! Files of records, templates, examples and rows that are refused.

mod examples;
#[cfg(unix)]
mod files;
mod rows;
