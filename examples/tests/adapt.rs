//! `adapt` says how a training went.
#![cfg(feature = "flex")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Runs a program in a directory.
fn run(dir: &Path, command: &str) -> Output {
    let mut words = command.split(' ');
    let mut program = std::env::current_exe().unwrap();
    // From target/PROFILE/deps/adapt-HASH to target/PROFILE/examples/NAME.
    program.pop();
    program.pop();
    program.extend(["examples", words.next().unwrap()]);
    let mut command = Command::new(&program);
    let command = command.current_dir(dir).args(words);
    command.args(["--device", "flex"]).output().unwrap()
}

/// Runs a program that succeeds.
fn done(dir: &Path, command: &str) {
    let output = run(dir, command);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {error}");
}

/// Runs a program that fails, and returns its error.
fn refused(dir: &Path, command: &str) -> String {
    let output = run(dir, command);
    assert_eq!(output.status.code(), Some(1), "{command}");
    String::from_utf8(output.stderr).unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A packed model is tuned on its codes, goes on from its adapters, and leaves in the format that is asked
/// for.
#[test]
fn packed_models_are_tuned_and_leave_in_their_format() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path();
    let text = |seed| examples::corpus::text(examples::corpus::Dialect::Old, 20_000, seed);
    std::fs::write(dir.join("train"), text(1)).unwrap();
    std::fs::write(dir.join("eval"), text(2)).unwrap();
    let whole = dir.join("whole");
    std::fs::create_dir(&whole).unwrap();
    let dense = examples::embedded::write(&whole, examples::embedded::Architecture::Llama).unwrap();
    let dense = dense.display();
    let quantize = format!(
        "quantize --model {dense} --calibration train --seq-len 32 --quantizer rtn --bits 4 --group-size 32"
    );
    done(dir, &format!("{quantize} --format gptq-v2 --out gptq"));
    done(dir, &format!("{quantize} --out own"));
    let data = "--train train --eval eval --seq-len 32 --batch 2 --steps 3 --eval-windows 8";
    let adapt = |model: &str| format!("adapt --model {model} {data}");
    let report = |out: &str| {
        let report = json(&dir.join(out).join("report.json"));
        let run = &report["runs"][0];
        assert!(run["tuned"]["task"].as_f64() < run["rounded"]["task"].as_f64());
        run.clone()
    };
    let method = |run: &Value| run["settings"][0]["method"].as_str().unwrap().to_string();

    // On scales in f16, the merge is exact in a GPTQ checkpoint.
    done(
        dir,
        &format!("{} --format gptq-v2 --out tuned", adapt("gptq")),
    );
    let run = report("tuned");
    assert_eq!(run["certificate"]["layers"][0]["exactness"], "exact");
    assert_eq!(
        (run["saved_as"].as_str(), method(&run).as_str()),
        (Some("gptq-v2"), "peqa")
    );
    assert_eq!(run["settings"][0]["f16_scales"], true);
    assert!(dir.join("tuned/4-bit/quantize_config.json").exists());
    // The adapters go on, from where they were.
    let more = "--adapters tuned/4-bit-adapters --lr 2e-3 --format gptq-v2";
    done(dir, &format!("{} {more} --out more", adapt("gptq")));
    let further = report("more");
    assert_eq!(further["rounded"], run["rounded"]);
    assert!(further["losses"][0].as_f64() < run["losses"][0].as_f64());
    assert_eq!(further["certificate"]["layers"][0]["exactness"], "exact");

    // What the format does not hold is rounded where that is asked for.
    let hira = format!("{} --method qa-hira --format gptq-v2", adapt("gptq"));
    assert!(refused(dir, &hira).contains("--allow-rounding"));
    done(dir, &format!("{hira} --allow-rounding --out rounded"));
    let run = report("rounded");
    assert!(run["certificate"]["layers"][0]["exactness"]["rounded"].is_object());
    assert_eq!(run["saved_as"], "gptq-v2");
    let own = format!("{} --format gptq-v2", adapt("own"));
    assert!(refused(dir, &own).contains("scales of"));
    done(dir, &format!("{own} --allow-rounding --out own-rounded"));
    assert_eq!(report("own-rounded")["saved_as"], "gptq-v2");
    let lora = format!("{own} --method lora --allow-rounding");
    assert!(refused(dir, &lora).contains("kept beside their base"));
    done(
        dir,
        &format!("{own} --method lora --merge round --out again"),
    );
    assert_eq!(report("again")["saved_as"], "gptq-v2");

    // Adapters that do not fit are refused before they are trained.
    done(dir, &format!("{} --out f32", adapt("own")));
    let f32 = "--adapters f32/4-bit-adapters --lr 2e-3";
    assert!(refused(dir, &format!("{} {f32}", adapt("gptq"))).contains("another base"));
    assert!(refused(dir, &format!("{own} {f32}")).contains("train scales in f32"));
    let missing = format!("{} --adapters none --lr 2e-3", adapt("own"));
    assert!(refused(dir, &missing).contains("none/adapter_config.json"));
    // Asymmetric layers of version 1 are for the program that wrote them.
    let v1 = format!("adapt --model {dense} {data} --bits 4 --group-size 4 --format gptq");
    assert!(refused(dir, &v1).contains("a GPTQ v2 checkpoint does"));
}

/// A training that ruins the model ends with an error, after its results are written.
#[test]
fn a_learning_rate_that_ruins_the_model_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let run = |lr: &str| {
        let options = "adapt --method lora --merge dense --bits 4 --steps 5 --batch 2";
        let cut = "--seq-len 32 --eval-windows 8";
        let output = run(dir.path(), &format!("{options} {cut} --lr {lr}"));
        let report = json(&dir.path().join("adapt-report.json"));
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
