//! Links, pipes, directories and permissions.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use burn::tensor::Device;
use models::{Error, load};
use peft::{Adapters, Fingerprint};
use tempfile::TempDir;

use super::{
    CONFIG, INDEX, LLAMA, PLACES, SHARDS, WEIGHTS, assert_file, copy, golden, refusal,
    refusal_of_plan, sharded, without,
};

/// The result of `run`, unless it waits forever: nobody writes to the pipes of these tests.
#[track_caller]
fn in_time<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(run()));
    let result = receiver.recv_timeout(Duration::from_secs(60));
    result.expect("neither waits nor panics")
}

/// Asserts that the file `name` is there and cannot be read.
#[track_caller]
fn assert_unread(error: &Error, name: &str) {
    let is_said =
        matches!(error, Error::File(tensor_files::Error::Io { path, .. }) if path.ends_with(name));
    assert!(is_said, "{name}: {error:?}");
}

fn make_pipe(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
}

fn make_dir(path: &Path) {
    fs::create_dir(path).unwrap();
}

const MAKE: [fn(&Path); 2] = [make_pipe, make_dir];

#[test]
fn a_pipe_or_a_directory_in_the_place_of_a_file_is_refused() {
    for make in MAKE {
        for name in PLACES {
            let dir = without(name);
            make(&dir.path().join(name));
            let path = dir.path().to_owned();
            let error = in_time(move || refusal(&path));
            assert_file(&error, name, "not a regular file");
            if [CONFIG, WEIGHTS, INDEX].contains(&name) {
                let path = dir.path().to_owned();
                let error = in_time(move || refusal_of_plan(&path));
                assert_file(&error, name, "not a regular file");
            }
        }
        let dir = sharded(|_, _| ());
        let shard = dir.path().join(SHARDS[1]);
        fs::remove_file(&shard).unwrap();
        make(&shard);
        let path = dir.path().to_owned();
        let error = in_time(move || refusal(&path));
        assert_file(&error, SHARDS[1], "not a regular file");
    }
}

#[test]
fn a_pipe_or_a_directory_in_the_place_of_adapters_is_refused() {
    const CONFIG: &str = "adapter_config.json";
    const TENSORS: &str = "adapter_model.safetensors";
    for make in MAKE {
        for (name, other) in [(CONFIG, TENSORS), (TENSORS, CONFIG)] {
            let dir = tempfile::tempdir().unwrap();
            let bytes = fs::read(golden("lora_llama_all").join(other)).unwrap();
            fs::write(dir.path().join(other), bytes).unwrap();
            make(&dir.path().join(name));
            let path = dir.path().to_owned();
            let error = in_time(move || {
                let model = load(golden("llama_gqa"), &Device::flex()).unwrap().model;
                Adapters::load_hf(path, &model).unwrap_err()
            });
            assert_file(&error.into(), name, "not a regular file");
        }
        let dir = tempfile::tempdir().unwrap();
        make(&dir.path().join(CONFIG));
        let path = dir.path().to_owned();
        let error = in_time(move || Adapters::load(path, &Device::flex()).unwrap_err());
        assert_file(&error.into(), CONFIG, "not a regular file");
    }
}

/// Not the same as no file at all, without which a model may be loaded.
#[test]
fn a_link_that_leads_nowhere_is_refused() {
    for name in PLACES {
        let dir = without(name);
        symlink("nowhere", dir.path().join(name)).unwrap();
        assert_unread(&refusal(dir.path()), name);
    }
    let dir = sharded(|_, _| ());
    let shard = dir.path().join(SHARDS[0]);
    fs::remove_file(&shard).unwrap();
    symlink("nowhere", &shard).unwrap();
    assert_unread(&refusal(dir.path()), SHARDS[0]);
}

/// The files of a directory where Hugging Face's cache has them: beside it, under other names.
fn linked(dir: &Path) -> TempDir {
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (
        cache.path().join("blobs"),
        cache.path().join("snapshots/main"),
    );
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for (at, entry) in fs::read_dir(dir).unwrap().enumerate() {
        let entry = entry.unwrap();
        let blob = format!("{at:040x}");
        fs::write(blobs.join(&blob), fs::read(entry.path()).unwrap()).unwrap();
        let target = Path::new("../../blobs").join(blob);
        symlink(target, snapshot.join(entry.file_name())).unwrap();
    }
    cache
}

#[test]
fn links_are_followed() {
    let expected = load(golden(LLAMA), &Device::flex()).unwrap();
    for dir in [copy(LLAMA), sharded(|_, _| ())] {
        let cache = linked(dir.path());
        let lm = load(cache.path().join("snapshots/main"), &Device::flex()).unwrap();
        assert!(lm.tokenizer.is_some());
        // The golden directory has no tokenizer.
        let differences = Fingerprint::of(&expected.model).differences(&Fingerprint::of(&lm.model));
        assert!(differences.is_empty(), "{differences:?}");
    }
}

#[test]
fn a_file_that_may_not_be_read_is_refused() {
    for name in PLACES {
        let dir = without(name);
        let path = dir.path().join(name);
        fs::write(&path, "{}").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
        if File::open(&path).is_ok() {
            eprintln!("skipped: this user may read everything");
            return;
        }
        assert_unread(&refusal(dir.path()), name);
    }
}

/// macOS has no such names.
#[cfg(target_os = "linux")]
#[test]
fn a_path_need_not_be_utf_8() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let dir = tempfile::tempdir().unwrap();
    let [from, to] =
        [&b"from\xff"[..], b"to\xfe"].map(|name| dir.path().join(OsStr::from_bytes(name)));
    fs::rename(copy(LLAMA).keep(), &from).unwrap();
    let lm = load(&from, &Device::flex()).unwrap();
    models::save(&lm, &to).unwrap();
    let again = load(&to, &Device::flex()).unwrap();
    assert_eq!(Fingerprint::of(&again.model), Fingerprint::of(&lm.model));
    assert!(again.tokenizer.is_some());

    fs::remove_file(from.join(WEIGHTS)).unwrap();
    assert!(matches!(
        refusal(&from),
        Error::Checkpoint(models::CheckpointError::NoWeights { .. })
    ));
}
