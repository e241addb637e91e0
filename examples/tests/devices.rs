//! A device tunes a model as the processor does.
#![cfg(all(feature = "flex", feature = "wgpu"))]

use std::process::Command;

use serde_json::Value;

/// The report of `adapt`, cut down to what a software device does in a minute or two.
fn report(device: &str) -> Value {
    let mut program = std::env::current_exe().unwrap();
    // From target/PROFILE/deps/devices-HASH to target/PROFILE/examples/adapt.
    program.pop();
    program.pop();
    program.extend(["examples", "adapt"]);
    assert!(
        program.exists(),
        "{} is missing: build the example with the features of this test",
        program.display()
    );
    let dir = tempfile::tempdir().unwrap();
    let options = "--bits 4,3 --steps 5 --batch 2 --seq-len 32 --eval-windows 8";
    let output = Command::new(program)
        .current_dir(dir.path())
        .args(options.split(' '))
        .args(["--device", device])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "on {device}: {errors}");
    let json = std::fs::read(dir.path().join("adapt-report.json")).unwrap();
    serde_json::from_slice(&json).unwrap()
}

#[test]
fn losses_and_perplexities_are_those_of_the_processor() {
    let [found, expected] = ["wgpu", "flex"].map(report);
    assert_eq!(found["device"], "wgpu");
    let runs = |report: &Value| report["runs"].as_array().unwrap().clone();
    assert_eq!(runs(&expected).len(), 2);
    for (found, expected) in runs(&found).iter().zip(runs(&expected)) {
        let losses = |run: &Value| -> Vec<f64> {
            let losses = run["losses"].as_array().unwrap().iter();
            losses.map(|loss| loss.as_f64().unwrap()).collect()
        };
        let (losses, expected_losses) = (losses(found), losses(&expected));
        assert_eq!(expected_losses.len(), 5);
        assert_eq!(losses.len(), 5);
        for (found, expected) in losses.iter().zip(&expected_losses) {
            assert!((found - expected).abs() <= 1e-3, "{found} for {expected}");
        }
        for stage in ["rounded", "tuned", "reloaded"] {
            for text in ["base", "task"] {
                let nll = |run: &Value| run[stage][text].as_f64().unwrap().ln();
                let (found, expected) = (nll(found), nll(&expected));
                assert!(
                    (found - expected).abs() <= 1e-3,
                    "{stage}, {text}: {found} for {expected}"
                );
            }
        }
    }
}
