//! The memory of this process, where the system tells.

use std::fs;

/// Begins a new peak. Without effect where the system has no way.
pub fn reset_peak() {
    // Linux: 5 resets the high-water mark of the resident set. Elsewhere the peak stays overall.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The largest resident set since [`reset_peak`], in bytes.
pub fn peak_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// The resident set now, in bytes.
pub fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

fn status(field: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
