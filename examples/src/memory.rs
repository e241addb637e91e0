//! The resident memory of this process, on Linux.

use std::fs;

/// Resets the peak. Has no effect on other systems than Linux.
pub fn reset_peak() {
    // 5 resets the high-water mark of the resident set.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Returns the largest resident set since [`reset_peak`], in bytes.
pub fn peak_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// Returns the largest resident set since [`reset_peak`] as text, `93 MiB`, or a dash if it is not known.
pub fn peak() -> String {
    peak_bytes().map_or("-".into(), |n| format!("{} MiB", n >> 20))
}

/// Returns the resident set, in bytes.
pub fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

fn status(field: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
