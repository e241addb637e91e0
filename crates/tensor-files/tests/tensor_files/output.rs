//! Reservations of directories, and processes that are killed while they write.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tensor_files::{Error, LazyTensor, Output, Result, write_directory, write_json, write_tensors};

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// Refused before there is something to lose, by its own name, and without a trace.
#[test]
fn a_place_that_cannot_be_taken_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "mine").unwrap();
    fs::create_dir(at("full")).unwrap();
    fs::write(at("full/mine"), "mine").unwrap();
    for name in ["file", "full"] {
        let error = Output::reserve(at(name)).unwrap_err();
        assert!(matches!(&error, Error::OutputExists { path } if *path == at(name)));
    }
    let error = Output::reserve(at("file/new")).unwrap_err();
    assert!(
        matches!(&error, Error::Io { path, .. } if *path == at("file/new")),
        "{error}"
    );
    let long = "n".repeat(250);
    let error = Output::reserve(at(&long)).unwrap_err();
    assert!(
        matches!(&error, Error::Io { path, .. } if *path == at(&long)),
        "{error}"
    );
    assert!(Output::reserve("/").is_err());
    assert_eq!(names(dir.path()), ["file", "full"]);
}

/// A link would be replaced by the directory, or nothing be written.
#[cfg(unix)]
#[test]
fn a_link_is_no_free_place() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("empty")).unwrap();
    for (link, target) in [("to-empty", "empty"), ("to-nothing", "nothing")] {
        std::os::unix::fs::symlink(target, at(link)).unwrap();
        let error = Output::reserve(at(link)).unwrap_err();
        assert!(matches!(error, Error::OutputExists { .. }), "{error}");
    }
    // Nor is one in the hidden place followed.
    fs::write(at("empty/mine"), "mine").unwrap();
    std::os::unix::fs::symlink("empty", at(".new.tensor-files.tmp")).unwrap();
    let error = Output::reserve(at("new")).unwrap_err();
    assert!(matches!(error, Error::File { .. }), "{error}");
    assert!(at("empty/mine").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a_mount_point_is_no_free_place() {
    use std::os::unix::fs::MetadataExt;

    // A directory of this file system cannot be renamed to one of another.
    let device = |dir: &str| fs::symlink_metadata(dir).map(|found| found.dev()).ok();
    if device("/dev/shm").is_some_and(|shm| Some(shm) != device("/dev"))
        && fs::read_dir("/dev/shm").is_ok_and(|mut entries| entries.next().is_none())
    {
        let error = Output::reserve("/dev/shm").unwrap_err();
        assert!(error.to_string().contains("mount point"), "{error}");
    }
    // Nothing can be made here, whoever asks.
    let error = Output::reserve("/proc/new/model").unwrap_err();
    assert!(error.to_string().starts_with("`/proc/new`: "), "{error}");
}

#[cfg(unix)]
#[test]
fn room_is_asked_for_in_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let output = Output::reserve(dir.path().join("new")).unwrap();
    output.require(1).unwrap();
    let error = output.require(u64::MAX).unwrap_err();
    let Error::NoRoom { needed, free, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(needed, u64::MAX);
    assert!((1..needed).contains(&free));
    let said = error.to_string();
    assert!(
        said.contains(&needed.to_string()) && said.contains(&free.to_string()),
        "{said}"
    );
}

#[test]
fn a_reservation_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let new = dir.path().join("a/b/new");
    drop(Output::reserve(&new).unwrap());
    assert_eq!(names(dir.path()).len(), 0);
    let output = Output::reserve(&new).unwrap();
    // Another program makes use of a directory that was made for the output.
    fs::write(dir.path().join("a/other"), "theirs").unwrap();
    drop(output);
    assert_eq!(names(&dir.path().join("a")), ["other"]);
    write_directory(&new, |_| Ok::<(), Error>(())).unwrap();
    assert_eq!(names(&dir.path().join("a/b")), ["new"]);
}

/// Files of directories within are flushed too, and a name that was taken meanwhile is left alone.
#[test]
fn directories_may_be_nested() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let write = |dir: &Path| {
        fs::create_dir(dir.join("inner")).map_err(|cause| Error::Io {
            path: dir.into(),
            cause,
        })?;
        fs::write(dir.join("inner/file"), "text").unwrap();
        write_directory(dir.join("base"), |dir| write_json(&dir.join("file"), &0))
    };
    write_directory(at("new"), write).unwrap();
    assert_eq!(names(&at("new")), ["base", "inner"]);
    let output = Output::reserve(at("late")).unwrap();
    fs::create_dir(at("late")).unwrap();
    fs::write(at("late/theirs"), "theirs").unwrap();
    let error = output.write(write).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }), "{error}");
    assert_eq!(names(&at("late")), ["theirs"]);
    assert_eq!(names(dir.path()), ["late", "new"]);
}

/// The hidden directory of a process that lives is not removed; that of a dead one is.
#[cfg(unix)]
#[test]
fn a_place_is_reserved_once() {
    let dir = tempfile::tempdir().unwrap();
    let new = dir.path().join("new");
    let first = Output::reserve(&new).unwrap();
    for _ in 0..2 {
        let error = Output::reserve(&new).unwrap_err();
        assert!(
            matches!(&error, Error::OutputBusy { path } if *path == new),
            "{error}"
        );
    }
    first.write(|_| Ok::<(), Error>(())).unwrap();

    let hidden = dir.path().join(".other.tensor-files.tmp");
    fs::create_dir_all(hidden.join("deep")).unwrap();
    fs::write(hidden.join("deep/half"), "half").unwrap();
    let other = dir.path().join("other");
    write_directory(&other, |dir| {
        tensor_files::write(&dir.join("file"), b"whole")
    })
    .unwrap();
    assert_eq!(names(dir.path()), ["new", "other"]);
    assert_eq!(names(&other), ["file"]);

    fs::write(
        dir.path().join(".a.json.tensor-files.tmp"),
        "longer than what follows",
    )
    .unwrap();
    write_json(&dir.path().join("a.json"), &[1]).unwrap();
    assert_eq!(names(dir.path()), ["a.json", "new", "other"]);
    assert_eq!(
        fs::read_to_string(dir.path().join("a.json")).unwrap(),
        "[\n  1\n]\n"
    );
}

/// All of a number of threads that begin at the same time, but one, are refused.
#[cfg(unix)]
#[test]
fn of_those_that_come_at_once_one_writes() {
    for _ in 0..50 {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".new.tensor-files.tmp")).unwrap();
        let new = dir.path().join("new");
        let write = |at: usize| write_directory(&new, |dir| write_json(&dir.join("file"), &at));
        let results: Vec<Result<()>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|at| scope.spawn(move || write(at))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let written: Vec<usize> = (0..4).filter(|&at| results[at].is_ok()).collect();
        let refused = |result: &Result<()>| {
            matches!(
                result,
                Ok(()) | Err(Error::OutputBusy { .. } | Error::OutputExists { .. })
            )
        };
        assert!(results.iter().all(refused), "{results:?}");
        assert_eq!(written.len(), 1, "{results:?}");
        let found: usize = tensor_files::read_json(&new.join("file")).unwrap();
        assert_eq!(found, written[0]);
        assert_eq!(names(dir.path()), ["new"]);
    }
}

#[test]
fn what_is_being_written_is_not_canceled() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let output = Output::reserve(at("canceled")).unwrap();
    output.canceler().cancel();
    assert_eq!(names(dir.path()).len(), 0);
    let error = output.write(|_| Ok::<(), Error>(())).unwrap_err();
    assert!(matches!(&error, Error::Canceled { path } if *path == at("canceled")));
    assert_eq!(names(dir.path()).len(), 0);

    let output = Output::reserve(at("written")).unwrap();
    let canceler = output.canceler();
    let (began, begins) = mpsc::channel();
    let writer = thread::spawn(move || {
        output.write(|dir| {
            began.send(()).unwrap();
            thread::sleep(Duration::from_millis(50));
            tensor_files::write(&dir.join("file"), b"whole")
        })
    });
    begins.recv().unwrap();
    canceler.cancel();
    assert!(at("written").join("file").exists());
    writer.join().unwrap().unwrap();
    canceler.cancel();
    assert_eq!(names(dir.path()), ["written"]);
}

/// Writes tensors whose types take a second file, and JSON.
fn write_sample(dir: &Path) -> Result<()> {
    write_directory(dir, |dir| {
        let tensors = (0..8).map(|at| {
            let values = move || (0..4096).map(|i| (i * (at + 1)) as f32 * 0.1).collect();
            (format!("tensor.{at}"), LazyTensor::floats([4096], values))
        });
        write_tensors(&dir.join("model.safetensors"), tensors)?;
        tensor_files::write(&dir.join("tokenizer.json"), b"{}")?;
        write_json(&dir.join("config.json"), &"config")
    })
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |name: String| (name.clone(), fs::read(dir.join(name)).unwrap());
    names(dir).into_iter().map(read).collect()
}

/// The test runs itself, kills what it runs, and looks at what is left.
#[test]
fn a_killed_save_is_whole_or_absent_and_the_next_one_clears_it() {
    const TEST: &str = "output::a_killed_save_is_whole_or_absent_and_the_next_one_clears_it";
    const DIR: &str = "TENSOR_FILES_TEST_SAVES_TO";
    if let Some(dir) = std::env::var_os(DIR) {
        write_sample(Path::new(&dir)).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let save = |dir: &Path| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let child = child.args(["--exact", TEST]).env(DIR, dir);
        child.stdout(Stdio::null()).spawn().unwrap()
    };
    let whole = dir.path().join("whole");
    let start = Instant::now();
    assert!(save(&whole).wait().unwrap().success());
    let (time, expected) = (start.elapsed(), contents(&whole));
    assert_eq!(expected.len(), 3);
    for at in 0..20 {
        let place = tempfile::tempdir().unwrap();
        let new = place.path().join("new");
        let mut child = save(&new);
        thread::sleep(time * at / 20);
        child.kill().unwrap();
        child.wait().unwrap();
        if !new.exists() {
            write_sample(&new).unwrap();
        }
        assert_eq!(contents(&new), expected);
        assert_eq!(names(place.path()), ["new"]);
    }
}
