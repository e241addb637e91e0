//! Jinja2 as transformers compiles it: another program's renderings are those of the golden file.
//!
//! `INTEROP_PYTHON` names the Python that has transformers, or it is `python3`.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use serde_json::Value;

#[test]
#[ignore = "needs Python with transformers"]
fn jinja_renders_the_constructs_as_in_the_golden_file() {
    let python = env::var("INTEROP_PYTHON").unwrap_or("python3".into());
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("jinja.json");
    let script = Command::new(&python)
        .arg(golden.join("make_jinja.py"))
        .arg(&path)
        .output();
    let script = script.unwrap();
    let errors = String::from_utf8_lossy(&script.stderr);
    assert!(script.status.success(), "{errors}");
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let [made, kept] = [path, golden.join("jinja.json")].map(|path| read(&path));
    assert_eq!(made["context"], kept["context"]);
    let [made, kept] = [&made, &kept].map(|golden| golden["cases"].as_array().unwrap());
    assert_eq!(made.len(), kept.len());
    for (made, kept) in made.iter().zip(kept) {
        // What an error says may depend on the version.
        assert_eq!(
            [&made["source"], &made["text"]],
            [&kept["source"], &kept["text"]]
        );
    }
}
