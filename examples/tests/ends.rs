//! The ends of the programs: what is refused before the work, signals, kills, and closed pipes.
#![cfg(all(unix, feature = "flex"))]

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use examples::embedded::{self, Architecture};
use tempfile::TempDir;

/// A program with options.
fn program(name: &str, options: &str) -> Command {
    let mut path = std::env::current_exe().unwrap();
    // From target/PROFILE/deps/ends-HASH to target/PROFILE/examples/NAME.
    path.pop();
    path.pop();
    path.extend(["examples", name]);
    assert!(
        path.exists(),
        "{} is missing: build the examples",
        path.display()
    );
    let mut command = Command::new(path);
    command
        .args(options.split_whitespace())
        .args(["--device", "flex"]);
    command
}

fn quantize(out: &Path, options: &str) -> Command {
    let mut command = program("quantize", "--bits 4 --samples 1 --seq-len 64");
    command.args(options.split_whitespace());
    command.arg("--out").arg(out);
    command
}

const RTN: &str = "--quantizer rtn --group-size 32";

/// A directory for outputs and temporary files, and a path in it.
fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    (dir, out)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

fn run(mut command: Command) -> Output {
    command.output().unwrap()
}

#[track_caller]
fn assert_fails(output: &Output, part: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(part), "{said}");
}

/// The options of a run that reserves its output: bits by layer, in the embedded model.
const BY_LAYER: &str = "--quantizer rtn --group-size 32 --bits-per-weight 7";

/// Starts a program and waits until it has reserved its output.
fn started(mut command: Command, dir: &Path) -> Child {
    let scratch = dir.join("scratch");
    fs::create_dir_all(&scratch).unwrap();
    command.env("TMPDIR", scratch);
    let child = command.stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !dir.join(".out.tensor-files.tmp").exists() {
        assert!(start.elapsed() < Duration::from_secs(60));
        thread::sleep(Duration::from_millis(1));
    }
    child
}

#[test]
fn two_runs_do_not_take_one_place() {
    let evaluate = |out: &Path| {
        let mut command = program("evaluate", "--limit 2 --seq-len 32 --bits 4");
        command.arg("--out").arg(out);
        command
    };
    let quantize = |out: &Path| quantize(out, RTN);
    type Run<'a> = &'a dyn Fn(&Path) -> Command;
    type Place = fn(&Path) -> Box<dyn std::any::Any>;
    let reserved: Place = |out| Box::new(tensor_files::Output::reserve(out).unwrap());
    let partial: Place = |out| Box::new(tensor_files::Partial::open(out).unwrap());
    let runs: [(Run, Place, &str); 2] = [
        (&quantize, partial, "config.json"),
        (&evaluate, reserved, "report.json"),
    ];
    for (command, place, file) in runs {
        let (dir, out) = self::place();
        let first = place(&out);
        assert_fails(&run(command(&out)), "another process is writing");
        drop(first);
        assert!(run(command(&out)).status.success());
        let saved = fs::read(out.join(file)).unwrap();
        assert_fails(&run(command(&out)), "is not an empty directory");
        assert_eq!(fs::read(out.join(file)).unwrap(), saved);
        assert_eq!(names(dir.path()), ["out"]);
    }
}

#[test]
fn a_signal_removes_what_is_half_made_and_a_kill_is_cleared_by_the_next() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let (dir, out) = place();
        let mut child = started(quantize(&out, BY_LAYER), dir.path());
        let kill = |id: u32| {
            Command::new("kill")
                .args(["-s", signal, &id.to_string()])
                .status()
        };
        assert!(kill(child.id()).unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert_eq!(names(dir.path()), ["scratch"]);
        assert_eq!(names(&dir.path().join("scratch")).len(), 0);
    }
    let (dir, out) = place();
    let mut child = started(quantize(&out, BY_LAYER), dir.path());
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert_eq!(names(dir.path()), [".out.tensor-files.tmp", "scratch"]);
    assert!(run(quantize(&out, BY_LAYER)).status.success());
    assert_eq!(names(dir.path()), ["out", "scratch"]);
}

/// The base and its adapters are those of a run that nothing disturbed.
#[test]
fn an_initialization_that_is_killed_goes_on() {
    let options = "--method apiq-block --bits 2 --group-size 32 --rank 4 --samples 4 --seq-len 64 \
                   --eval-windows 2 --steps 2 --resume";
    let init = |out: &Path| {
        let mut command = program("loftq_init", options);
        command.arg("--out").arg(out);
        command
    };
    let (dir, out) = place();
    let whole = dir.path().join("whole");
    let output = run(init(&whole));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for part in [
        "bytes",
        "base with adapters",
        "steps of tuning",
        "of the dense model",
    ] {
        assert!(said.contains(part), "no {part} in: {said}");
    }
    let all = ["adapter", "adapter-tuned", "base", "report.json"];
    assert_eq!(names(&whole), all);
    let first = dir
        .path()
        .join("out.partial/files/base/model-00002-of-00006.safetensors");
    let mut child = init(&out).stdout(Stdio::null()).spawn().unwrap();
    while !first.exists() && !out.exists() {
        assert!(child.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if !out.exists() {
        let output = run(init(&out));
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("going on after"), "{said}");
        assert_eq!(names(dir.path()), ["out", "whole"]);
    }
    for part in ["adapter", "base"] {
        let files = |out: &Path| {
            let dir = out.join(part);
            let read = |name: &String| fs::read(dir.join(name)).unwrap();
            names(&dir).iter().map(read).collect::<Vec<_>>()
        };
        assert!(files(&out) == files(&whole), "{part}");
    }

    // What looks at the whole model has nothing to go on with, and a model needs the texts of its method.
    let refused = |options: &str| {
        let mut command = program("loftq_init", options);
        command.arg("--out").arg(dir.path().join("new"));
        run(command)
    };
    let one = "--bits 4 --group-size 32 --rank 4";
    assert_fails(
        &refused(&format!("--method rilq {one} --resume")),
        "--resume",
    );
    for method in ["apiq", "rilq", "loftq"] {
        let output = refused(&format!("--model missing --method {method} {one}"));
        assert_fails(&output, "add --");
    }
    assert!(!names(dir.path()).iter().any(|name| name.contains("new")));
}

#[test]
fn a_format_that_cannot_hold_the_layers_is_refused() {
    // The recipe tells: nothing is computed.
    let (dir, out) = place();
    let output = run(quantize(
        &out,
        "--quantizer nf --group-size 32 --format gptq-v2",
    ));
    assert_fails(&output, "GPTQ's grids are uniform");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("error"));
    assert_eq!(names(dir.path()).len(), 0);
    let output = run(quantize(
        &out,
        "--quantizer rtn --group-size 32 --format gptq",
    ));
    assert_fails(&output, "a GPTQ v2 checkpoint does");
    assert_eq!(names(dir.path()).len(), 0);
}

/// Formats, widths, budgets, places and texts: no layer is quantized before they are refused.
#[test]
fn what_cannot_be_quantized_is_refused_before_the_work() {
    let (dir, out) = place();
    let model = embedded::write(dir.path(), Architecture::Llama).unwrap();
    let [long, short] = ["long", "short"].map(|name| dir.path().join(name));
    fs::write(&long, "one two three ".repeat(200)).unwrap();
    fs::write(&short, "one").unwrap();
    let (model, long, short) = (model.display(), long.display(), short.display());
    let three = "--quantizer optq --group-size 32 --bits 3";
    let average = "--quantizer optq --group-size 128 --bits-per-weight";
    let texts = |calibration, eval| {
        format!("{three} --model {model} --calibration {calibration} --eval {eval}")
    };
    let cases = [
        (format!("{three} --format bitsandbytes"), "28 layers"),
        (three.replace("--bits 3", "--bits 5"), "28 layers"),
        (format!("{average} 2.4"), "take 2.500 with scales and zeros"),
        (format!("{average} 3.2 --quantizer rtn"), "one --quantizer"),
        (texts(&short, &long), "the --calibration text: the text has"),
        (texts(&long, &short), "the --eval text: the text has"),
        (format!("{three} --bits 4"), "one of --bits"),
    ];
    for (options, part) in cases {
        let mut command = program("quantize", &options);
        command.arg("--out").arg(&out);
        let output = run(command);
        assert_fails(&output, part);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(!said.contains("error"), "{options}: {said}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.matches("q_proj").count() <= 2, "{options}: {said}");
        assert!(!out.exists(), "{options}");
    }
    let several = format!("--model {model} --calibration {long} --bits 3 2");
    assert_fails(&run(program("quantize", &several)), "add --eval");
}

/// The average holds, the table is printed, and the mixed widths are read back.
#[test]
fn bits_are_chosen_under_an_average() {
    let (_dir, out) = place();
    let options = "--quantizer optq --group-size 32 --bits 2 3 4 --bits-per-weight 5.1";
    let mut command = program("quantize", options);
    let cut = "--samples 8 --seq-len 64 --eval-windows 2 --out";
    command.args(cut.split(' ')).arg(&out);
    let output = run(command);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for part in [
        "by the loss",
        "all 3-bit affine",
        "measured loss",
        "after",
        "peak memory",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let lm = models::load(&out, &Device::flex()).unwrap();
    let linears = peft::Linears::linears(&lm.model);
    let [mut n_bytes, mut n_weights] = [0, 0];
    for (_, linear) in &linears {
        n_bytes += linear.weight().n_bytes();
        n_weights += linear.weight().dims().iter().product::<usize>();
    }
    let average = 8.0 * n_bytes as f64 / n_weights as f64;
    assert!((5.0..=5.1).contains(&average), "{average}");
}

#[test]
fn a_closed_or_full_output_loses_no_model() {
    let (_dir, out) = place();
    let mut child = quantize(&out, RTN).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    models::load(&out, &Device::flex()).unwrap();

    let (_dir, out) = place();
    if let Ok(full) = File::options().write(true).open("/dev/full") {
        let mut command = quantize(&out, RTN);
        let output = command.stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        assert_fails(
            &output.wait_with_output().unwrap(),
            "standard output is incomplete",
        );
        models::load(&out, &Device::flex()).unwrap();
    }

    let mut help = program("quantize", "--help");
    let mut child = help
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.stderr.is_empty() && output.status.code() == Some(0),
        "{output:?}"
    );
}

#[test]
fn errors_name_the_place() {
    let (dir, _) = place();
    fs::write(dir.path().join("file"), "").unwrap();
    let output = run(quantize(&dir.path().join("file/out"), RTN));
    assert_fails(&output, "file/out`: Not a directory");

    let text = dir.path().join("text");
    fs::write(&text, b"one\ntwo \xff").unwrap();
    let mut command = program("quantize", "--model missing");
    command
        .arg("--eval")
        .arg(&text)
        .arg("--calibration")
        .arg(&text);
    assert_fails(&run(command), "text`: invalid UTF-8 at byte 8, in line 2");
}
