//! `adapt` says how a training went.
#![cfg(feature = "flex")]

use std::process::Command;

use serde_json::Value;

/// A training that ruins the model ends with an error, after its results are written.
#[test]
fn a_learning_rate_that_ruins_the_model_is_an_error() {
    let mut program = std::env::current_exe().unwrap();
    // From target/PROFILE/deps/adapt-HASH to target/PROFILE/examples/adapt.
    program.pop();
    program.pop();
    program.extend(["examples", "adapt"]);
    let dir = tempfile::tempdir().unwrap();
    let run = |lr: &str| {
        let options = "--method lora --merge dense --bits 4 --steps 5 --batch 2";
        let cut = "--seq-len 32 --eval-windows 8 --device flex";
        let output = Command::new(&program)
            .current_dir(dir.path())
            .args(options.split(' ').chain(cut.split(' ')))
            .args(["--lr", lr])
            .output()
            .unwrap();
        let json = std::fs::read(dir.path().join("adapt-report.json")).unwrap();
        let report: Value = serde_json::from_slice(&json).unwrap();
        let run = &report["runs"][0];
        let perplexity = |stage: &str| run[stage]["task"].as_f64().unwrap();
        let factor = perplexity("tuned") / perplexity("rounded");
        let error = String::from_utf8(output.stderr).unwrap();
        (output.status.success(), factor, error)
    };
    let (is_fine, factor, error) = run("0.001");
    assert!(is_fine && factor < 1.0, "{factor}: {error}");
    let (is_fine, factor, error) = run("1000");
    assert!(!is_fine && factor > 2.0, "{factor}: {error}");
    let is_said = error.contains("learning rate of 1000") && error.contains("lower --lr");
    assert!(is_said, "{error}");
}
