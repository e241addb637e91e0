//! Saves that are killed.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use burn::tensor::Device;
use models::{load, save};
use peft::Fingerprint;

use super::fixtures::golden;

const MODEL: &str = "llama_gptq_w4_g32_sym";

/// The test runs itself, kills what it runs, and looks at what is left; `tools/kill-save.sh` kills a save
/// at each of its system calls.
#[test]
fn a_killed_save_is_a_whole_model_or_none() {
    const TEST: &str = "kill::a_killed_save_is_a_whole_model_or_none";
    const DIR: &str = "SAVE_TO";
    let lm = load(golden(MODEL), &Device::flex()).unwrap();
    if let Some(dir) = std::env::var_os(DIR) {
        save(&lm, Path::new(&dir)).unwrap();
        return;
    }
    let expected = Fingerprint::of(&lm.model);
    let dir = tempfile::tempdir().unwrap();
    let run = |dir: &Path| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let child = child.args(["--exact", TEST]).env(DIR, dir);
        child.stdout(Stdio::null()).spawn().unwrap()
    };
    let start = Instant::now();
    assert!(run(&dir.path().join("whole")).wait().unwrap().success());
    let time = start.elapsed();
    for at in 0..10 {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("made/model");
        let mut child = run(&out);
        thread::sleep(time * (at + 1) / 11);
        child.kill().unwrap();
        child.wait().unwrap();
        if !out.exists() {
            save(&lm, &out).unwrap();
        }
        let again = load(&out, &Device::flex()).unwrap();
        assert_eq!(Fingerprint::of(&again.model), expected);
        let left = fs::read_dir(place.path().join("made")).unwrap();
        assert_eq!(left.count(), 1);
    }
}
