//! Numbered directories.

use std::fs;

use tensor_files::{Error, Series, write};

#[test]
fn a_number_is_written_whole_or_not_at_all() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("made/series");
    let series = Series::open(&dir, "step-").unwrap();
    series
        .write(3, |dir| write(&dir.join("file"), b"3"))
        .unwrap();
    let failed = series.write(4, |dir| {
        write(&dir.join("file"), b"4")?;
        write(&dir.join("missing/file"), b"")
    });
    assert!(
        matches!(failed, Err(Error::Io { path, .. }) if path == dir.join("step-4/missing/file"))
    );
    assert_eq!(series.numbers().unwrap(), [3]);
    // One that is there is replaced.
    series
        .write(3, |dir| write(&dir.join("other"), b"3"))
        .unwrap();
    assert!(!dir.join("step-3/file").exists() && dir.join("step-3/other").exists());
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}

/// What a killed process left is removed, and nothing that is somebody else's.
#[test]
fn names_tell_what_belongs_to_a_series() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path();
    for name in ["step-7", "step-10", "step-07", "step-x", "step-", "other-3"] {
        fs::create_dir(dir.join(name)).unwrap();
    }
    let left = ["step-8", "step-9"].map(|name| dir.join(format!(".{name}.tensor-files.tmp")));
    let others = [
        ".step-08.tensor-files.tmp",
        ".step-8",
        ".new.tensor-files.tmp",
    ];
    for hidden in left
        .iter()
        .cloned()
        .chain(others.map(|name| dir.join(name)))
    {
        fs::create_dir(&hidden).unwrap();
        fs::write(hidden.join("part"), "half").unwrap();
    }
    let series = Series::open(dir, "step-").unwrap();
    assert_eq!(series.numbers().unwrap(), [7, 10]);
    assert!(left.iter().all(|left| !left.exists()));
    assert!(
        others
            .iter()
            .all(|other| dir.join(other).join("part").exists())
    );
    series.remove(7).unwrap();
    assert_eq!(series.numbers().unwrap(), [10]);
    assert!(series.remove(7).is_err());
}

#[test]
fn a_series_is_open_once_and_leaves_nothing_empty_behind() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("series");
    let series = Series::open(&dir, "step-").unwrap();
    let again = Series::open(&dir, "step-").unwrap_err();
    assert!(matches!(again, Error::OutputBusy { path } if path == dir));
    drop(series);
    assert!(!dir.exists());
    fs::write(&dir, "a file").unwrap();
    assert!(matches!(
        Series::open(&dir, "step-"),
        Err(Error::File { .. })
    ));
}
