//! What `evaluate` and `tasks` print and write.
#![cfg(feature = "flex")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use examples::embedded::{self, Architecture};
use serde_json::Value;

fn run(name: &str, dir: &Path, options: &str) -> Output {
    let mut path = std::env::current_exe().unwrap();
    // From target/PROFILE/deps/programs-HASH to target/PROFILE/examples/NAME.
    path.pop();
    path.pop();
    path.extend(["examples", name]);
    let mut command = Command::new(path);
    command.current_dir(dir).args(options.split_whitespace());
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// What is not asked for is neither measured nor mentioned.
#[test]
fn questions_alone_are_evaluated() {
    let dir = tempfile::tempdir().unwrap();
    embedded::write(dir.path(), Architecture::Llama).unwrap();
    let question = r#"{"context": "Albena is a", "choices": ["baker", "tree"], "answer": 0}"#;
    fs::write(dir.path().join("q.jsonl"), [question; 5].join("\n")).unwrap();
    let options = "--model embedded --choices q.jsonl --bits 3 4 --limit 4 --device flex";
    let output = run("evaluate", dir.path(), options);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for absent in ["gptq", "llama.cpp", "separator", "text", "gsm8k", "shots"] {
        assert!(!said.contains(absent), "{absent}: {said}");
    }
    assert!(said.contains("peak memory: "), "{said}");

    let json = fs::read(dir.path().join("evaluate/report.json")).unwrap();
    let report: Value = serde_json::from_slice(&json).unwrap();
    let expected = serde_json::json!({
        "program": format!("evaluate {}", env!("CARGO_PKG_VERSION")),
        "model `embedded`": "embedded",
        "bits": "4, 3, in groups of 32, of the first model",
        "device": "flex",
        "dtype": "f32",
        "choices": "q.jsonl",
        "limit": "4",
        "confidence intervals": "95 %, 1000 bootstrap resamples",
        "seed": "0",
        "out": "evaluate",
    });
    assert_eq!(report["settings"], expected);
    let measurements = report["measurements"].as_array().unwrap();
    assert_eq!(measurements.len(), 3 * 3);
    let of_choices = measurements.iter().filter(|of| of["protocol"] == "choices");
    assert_eq!(of_choices.filter(|of| of["n"] == 4).count(), 3 * 3);

    let output = run("evaluate", dir.path(), "--model embedded --out other");
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    let names_all = ["--text", "--choices", "--gsm8k"];
    assert!(names_all.iter().all(|name| said.contains(name)), "{said}");
}

/// Markdown is escaped in its file and not in the terminal.
#[test]
fn a_terminal_shows_no_entities() {
    let dir = tempfile::tempdir().unwrap();
    let options = "--limit 2 --seq-len 32 --bits 4 --device flex";
    let output = run("evaluate", dir.path(), options);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(said.contains(r#"separator: "<|endoftext|>""#), "{said}");
    assert!(!said.contains("&lt;"), "{said}");
    for setting in ["seq-len: 32", "n-ctx: ", "limit: 2", "bits: 4, "] {
        assert!(said.contains(setting), "{said}");
    }
    let markdown = fs::read_to_string(dir.path().join("evaluate/report.md")).unwrap();
    assert!(markdown.contains(r"&lt;\|endoftext\|>"), "{markdown}");
}

#[test]
fn tasks_has_options_and_help() {
    let dir = tempfile::tempdir().unwrap();
    let output = run("tasks", dir.path(), "--help");
    assert!(output.status.success());
    let said = text(&output.stdout);
    assert!(
        said.contains("Usage: tasks") && said.contains("--device"),
        "{said}"
    );
    let output = run("tasks", dir.path(), "--task");
    assert_eq!(output.status.code(), Some(2));
}
