//! `adapt` is stopped, goes on, and ends with the files of a run that nothing disturbed.
#![cfg(all(unix, feature = "flex"))]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Evaluations, checkpoints and steps of the embedded model at one width.
const OPTIONS: &str = "--bits 4 --method lora --steps 30 --batch 2 --seq-len 32 --eval-windows 4 --eval-every 10 --checkpoint-every 5 --device flex";

fn program() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    // From target/PROFILE/deps/resume-HASH to target/PROFILE/examples/adapt.
    path.pop();
    path.pop();
    path.extend(["examples", "adapt"]);
    path
}

/// `adapt` with more options, in a directory.
fn adapt(dir: &Path, options: &str) -> Command {
    let mut command = Command::new(program());
    command.current_dir(dir).args(OPTIONS.split(' '));
    command.args(options.split_whitespace());
    command
}

fn done(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(mut command: Command, code: i32) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{}", said(&output));
    said(&output)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Starts a program, and waits for a checkpoint of at least this step.
fn at_step(mut command: Command, dir: &Path, step: usize) -> Child {
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = child.spawn().unwrap();
    let start = Instant::now();
    let number = |path: PathBuf| {
        path.file_name()?
            .to_str()?
            .strip_prefix("step-")?
            .parse()
            .ok()
    };
    let is_there = || {
        let checkpoints = fs::read_dir(dir.join("out.partial/checkpoints/4-bit"));
        let entries = checkpoints.into_iter().flatten().flatten();
        let mut steps = entries.filter_map(|entry| number(entry.path()));
        steps.any(|at: usize| at >= step)
    };
    while !is_there() {
        assert!(start.elapsed() < Duration::from_secs(120));
        thread::sleep(Duration::from_millis(1));
    }
    child
}

/// The files of a result, without what tells how long things took.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let mut bytes = fs::read(&path).unwrap();
            match path.file_name().unwrap().to_str().unwrap() {
                "metrics.jsonl" => {
                    let text = String::from_utf8(bytes).unwrap();
                    let lines = text.lines().map(|line| {
                        let (line, timing) = line.split_once(",\"tokens_per_second\"").unwrap();
                        assert!(timing.contains("\"seconds\""));
                        line.to_string() + "\n"
                    });
                    bytes = lines.collect::<String>().into_bytes();
                }
                "events.out.tfevents" => bytes = bytes.len().to_string().into_bytes(),
                "report.json" => {
                    let mut report: Value = serde_json::from_slice(&bytes).unwrap();
                    report.as_object_mut().unwrap().remove("command");
                    let run = report["runs"][0].as_object_mut().unwrap();
                    for name in ["seconds", "peak_bytes", "resumed_from"] {
                        assert!(run.remove(name).is_some());
                    }
                    bytes = report.to_string().into_bytes();
                }
                _ => {}
            }
            files.insert(path.strip_prefix(dir).unwrap().into(), bytes);
        }
    }
    files
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[track_caller]
fn assert_same(dir: &Path, one: &str, other: &str) {
    let (one, other) = (files(&dir.join(one)), files(&dir.join(other)));
    let paths = |of: &BTreeMap<PathBuf, Vec<u8>>| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(paths(&one), paths(&other));
    let differs = one.iter().filter(|(path, bytes)| other[*path] != **bytes);
    let differs: Vec<&PathBuf> = differs.map(|(path, _)| path).collect();
    assert!(differs.is_empty(), "{differs:?}");
}

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    (dir, path)
}

#[test]
fn a_run_that_is_killed_and_interrupted_ends_as_one_that_is_not() {
    let (_dir, dir) = place();
    done(adapt(&dir, "--out whole"));
    // Killed.
    let mut child = at_step(adapt(&dir, "--out out"), &dir, 5);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(names(&dir), ["out.partial", "whole"]);
    let error = refused(adapt(&dir, "--out out"), 1);
    assert!(
        error.contains("add --resume to go on, or remove"),
        "{error}"
    );
    let error = refused(adapt(&dir, "--out out --resume --lr 0.1"), 1);
    assert!(
        error.contains("`lr` was not given, now it is 0.1"),
        "{error}"
    );
    // Interrupted: a checkpoint of the step, and the command that goes on.
    let child = at_step(adapt(&dir, "--out out --resume"), &dir, 15);
    let killed = Command::new("kill")
        .args(["-s", "INT", &child.id().to_string()])
        .status();
    assert!(killed.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let error = said(&output);
    assert_eq!(output.status.code(), Some(130), "{error}");
    let command = error.lines().last().unwrap();
    assert!(command.ends_with("--resume"), "{error}");
    let mut sh = Command::new("sh");
    sh.args(["-c", command]).current_dir(&dir);
    let text = done(sh);
    assert!(text.contains("going on after step"), "{text}");
    assert_same(&dir, "whole", "out");
    assert_eq!(names(&dir), ["out", "whole"]);
    let report: Value =
        serde_json::from_slice(&fs::read(dir.join("out/report.json")).unwrap()).unwrap();
    assert!(report["runs"][0]["resumed_from"].as_u64() >= Some(15));
}

/// Two processes of `mpirun`, one of which is killed: the job ends, and goes on to the same files.
#[cfg(feature = "mpi")]
#[test]
fn a_job_goes_on_where_a_process_was_killed() {
    let mpirun = |dir: &Path, options: &str| {
        let mut command = Command::new("mpirun");
        command
            .current_dir(dir)
            .args(["-np", "2", "--oversubscribe"])
            .arg(program());
        command
            .args(OPTIONS.split(' '))
            .args(options.split_whitespace());
        // Where the tests are run by root.
        command
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command
    };
    let (_dir, dir) = place();
    let text = done(mpirun(&dir, "--out whole"));
    // The second process is silent.
    assert_eq!(text.matches("report: ").count(), 1, "{text}");
    let report = fs::read(dir.join("whole/report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["n_processes"], 2);

    let job = at_step(mpirun(&dir, "--out out"), &dir, 5);
    let children = format!("/proc/{0}/task/{0}/children", job.id());
    let children = fs::read_to_string(children).unwrap();
    let last = children.split_whitespace().last().unwrap();
    let killed = Command::new("kill").args(["-s", "KILL", last]).status();
    assert!(killed.unwrap().success());
    let output = job.wait_with_output().unwrap();
    assert!(!output.status.success(), "{}", said(&output));
    assert!(dir.join("out.partial/checkpoints").exists() && !dir.join("out").exists());
    let text = done(mpirun(&dir, "--out out --resume"));
    assert!(text.contains("going on after step"), "{text}");
    assert_same(&dir, "whole", "out");
}

/// The settings of a result repeat it, and a signal before the first step leaves nothing.
#[test]
fn settings_repeat_a_run() {
    let (_dir, dir) = place();
    done(adapt(&dir, "--out whole"));
    let mut again = Command::new(program());
    again
        .current_dir(&dir)
        .args("--config whole/adapt.toml --out again".split(' '));
    done(again);
    assert_same(&dir, "whole", "again");
    let text = fs::read_to_string(dir.join("whole/adapt.toml")).unwrap();
    for part in [
        "version = 1\n",
        "bits = [4]\n",
        "lr = 0.005\n",
        "method = \"lora\"\n",
    ] {
        assert!(text.contains(part), "{text}");
    }
    fs::write(dir.join("bad.toml"), text + "lerning-rate = 1\n").unwrap();
    let error = refused(adapt(&dir, "--config bad.toml"), 2);
    assert!(error.contains("unknown key `lerning-rate`"), "{error}");
    assert_eq!(names(&dir), ["again", "bad.toml", "whole"]);
}

#[test]
fn a_training_ends_when_evaluations_do_not_improve() {
    let (_dir, dir) = place();
    let options = "--eval-every 2 --patience 2 --lr 0.02 --out out";
    let options = OPTIONS.replace("--eval-every 10 ", "") + " " + options;
    let mut command = Command::new(program());
    command.current_dir(&dir).args(options.split(' '));
    done(command);
    let report: Value =
        serde_json::from_slice(&fs::read(dir.join("out/report.json")).unwrap()).unwrap();
    let run = &report["runs"][0];
    assert_eq!(run["is_ended_early"], true);
    let n_steps = run["losses"].as_array().unwrap().len() as u64;
    let best = run["best"]["step"].as_u64().unwrap();
    assert_eq!(n_steps, best + 4);
    // The adapters are those of the best evaluation.
    let (loss, perplexity) = (&run["best"]["loss"], &run["tuned"]["task"]);
    let (loss, perplexity) = (loss.as_f64().unwrap(), perplexity.as_f64().unwrap());
    assert!(
        (loss.exp() / perplexity - 1.0).abs() < 1e-5,
        "{loss} {perplexity}"
    );
}
