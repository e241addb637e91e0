//! Runs of `reproduce` that are stopped, go on, and are refused.
#![cfg(feature = "flex")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

const OPTIONS: &str = "--bits 3 2 --eval-windows 2 --samples 2 --seq-len 64 --tune-len 32 --batch 2 --steps 4 --search-steps 2 --rank 4 --seed 0 --device flex";

fn program(dir: &Path, options: &str) -> Command {
    let mut path = std::env::current_exe().unwrap();
    // From target/PROFILE/deps/reproduce-HASH to target/PROFILE/examples/reproduce.
    path.pop();
    path.pop();
    path.extend(["examples", "reproduce"]);
    let mut command = Command::new(path);
    command.current_dir(dir);
    command.args(options.split(' ').chain(OPTIONS.split(' ')));
    command
}

fn run(dir: &Path, options: &str) -> Output {
    program(dir, options).output().unwrap()
}

fn success(dir: &Path, options: &str) {
    let output = run(dir, options);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

fn cells(run: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(run.join("cells")) else {
        return Vec::new();
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|of| of == "json"))
        .collect();
    paths.sort();
    paths
}

/// A cell without what depends on the machine.
fn measured(path: &Path) -> Value {
    fn clear(value: &mut Value) {
        if let Value::Object(fields) = value {
            for name in ["seconds", "peak_bytes"] {
                fields.remove(name);
            }
            fields.values_mut().for_each(clear);
        }
        if let Value::Array(values) = value {
            values.iter_mut().for_each(clear);
        }
    }
    let mut cell = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    clear(&mut cell);
    cell
}

/// A run that is killed goes on after its last cell to the numbers of one that was not, and the report is made
/// from the cells.
#[test]
fn a_killed_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    success(dir.path(), "ptq --out whole");
    let mut killed = program(dir.path(), "ptq --out killed");
    let mut killed = killed.stdout(Stdio::null()).spawn().unwrap();
    let place = dir.path().join("killed");
    while cells(&place).len() < 3 {
        assert!(killed.try_wait().unwrap().is_none(), "ended early");
        std::thread::sleep(Duration::from_millis(5));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let first = cells(&place).remove(0);
    let before = fs::read(&first).unwrap();
    success(dir.path(), "ptq --out killed");

    let whole = cells(&dir.path().join("whole"));
    assert_eq!(whole.len(), 1 + 2 * 6);
    for (killed, whole) in cells(&place).iter().zip(&whole) {
        assert_eq!(killed.file_name(), whole.file_name());
        assert_eq!(measured(killed), measured(whole));
    }
    assert_eq!(fs::read(&first).unwrap(), before);
    let report = |name| fs::read_to_string(place.join(name)).unwrap();
    let before = ["report.md", "report.json", "ptq.svg"].map(report);
    success(dir.path(), "ptq --out killed");
    let after = ["report.md", "report.json", "ptq.svg"].map(report);
    assert_eq!(after, before);
    assert!(before[0].contains("OPTQ's perplexity is below RTN's"));
}

#[test]
fn runs_with_other_settings_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    success(dir.path(), "merge --out run");
    let refused = |options: &str, expected: &[&str]| {
        let output = run(dir.path(), options);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        for part in expected {
            assert!(said.contains(part), "{part}: {said}");
        }
    };
    // The last of two values counts.
    let mut other = program(dir.path(), "merge --out run");
    let output = other.args(["--steps", "6"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("steps was 4, now it is 6"), "{said}");
    fs::create_dir(dir.path().join("mine")).unwrap();
    fs::write(dir.path().join("mine/notes.txt"), "").unwrap();
    refused("merge --out mine", &["not of a run", "--out"]);
    refused("merge --model here", &["--train"]);
}

/// Every experiment runs, and has its claims and its chart in the report.
#[test]
fn all_experiments_are_in_the_report() {
    let dir = tempfile::tempdir().unwrap();
    success(dir.path(), "--out run");
    let report: Value =
        serde_json::from_slice(&fs::read(dir.path().join("run/report.json")).unwrap()).unwrap();
    let sections = report["sections"].as_array().unwrap();
    let names = sections.iter().map(|section| section[0].as_str().unwrap());
    let names: Vec<&str> = names.collect();
    assert_eq!(names, ["ptq", "peqa", "loftq", "merge", "memory"]);
    for section in sections {
        let claims = section[1]["claims"].as_array().unwrap();
        assert!(!claims.is_empty());
        assert!(claims.iter().all(|claim| claim["evidence"][0].is_string()));
    }
    // Adapters on the grid are kept whole by their merge, up to the rounding of a change that is this small.
    let merge = &sections[3][1];
    assert_eq!(merge["title"], "Merges");
    for name in ["peqa", "peqa-zeros", "qa-lora", "qa-hira", "qa-blora"] {
        let kept = &report["cells"][format!("merge-{name}")]["kept"];
        assert_eq!(kept.as_array().unwrap().len(), 1, "{name}");
        let retention = kept[0]["retention"].as_f64().unwrap();
        assert!((retention - 1.0).abs() < 1e-4, "{name}: {retention}");
    }
    // Two windows are too few for a claim that compares models.
    let claim = &sections[0][1]["claims"][0];
    assert_eq!(claim["verdict"], "not-testable", "{claim}");
    let markdown = fs::read_to_string(dir.path().join("run/report.md")).unwrap();
    for name in ["ptq", "peqa", "loftq", "merge"] {
        assert!(markdown.contains(&format!("({name}.svg)")));
        assert!(dir.path().join(format!("run/{name}.svg")).is_file());
    }
}
