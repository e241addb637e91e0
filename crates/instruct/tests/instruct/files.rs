//! Permissions and names of files of records; pipes and directories are among the unit tests.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;

use instruct::{Error, read_records};

#[test]
fn a_file_that_may_not_be_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    fs::write(&path, "{}").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
    if File::open(&path).is_ok() {
        eprintln!("skipped: this user may read everything");
        return;
    }
    let error = read_records(&path).unwrap_err();
    let is_said = matches!(
        &error,
        Error::File(tensor_files::Error::Io { path: found, .. }) if *found == path
    );
    assert!(is_said, "{error:?}");
}

/// macOS has no such names.
#[cfg(target_os = "linux")]
#[test]
fn a_path_need_not_be_utf_8() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let dir = tempfile::tempdir().unwrap();
    let records = dir.path().join(OsStr::from_bytes(b"data\xff.jsonl"));
    fs::write(&records, "{\"a\": 1}\n").unwrap();
    assert_eq!(read_records(&records).unwrap().len(), 1);
}
