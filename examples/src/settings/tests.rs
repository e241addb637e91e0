use std::path::PathBuf;

use super::*;
use crate::arguments::{BitsArg, GroupSize};

#[derive(Parser, Debug)]
struct Program {
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    bits: BitsArg,
    #[arg(long, default_value = "1e-3")]
    lr: f64,
    #[arg(long)]
    alpha: Option<f32>,
    #[arg(long, default_value_t = 7)]
    seed: u64,
    #[arg(long, default_value = "peqa")]
    method: String,
    #[arg(long, conflicts_with = "method")]
    preset: Option<String>,
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
    #[arg(long)]
    symmetric: bool,
    #[arg(long)]
    group_size: Option<GroupSize>,
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Parses a command line, where `run.toml` is a file of this text.
fn parsed(file: &str, line: &str) -> std::result::Result<(Program, Settings), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, file).unwrap();
    let line = line.replace("run.toml", path.to_str().unwrap());
    let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
    parse_from(&words).map_err(|error| error.to_string())
}

#[test]
fn the_command_line_overrides_the_file() {
    let file = "bits = [4, 3]\nlr = 0.5\nseed = 3\ntargets = [\"a\", \"b\"]\nsymmetric = true\ngroup-size = 64";
    let (program, _) = parsed(file, "program --config run.toml").unwrap();
    assert_eq!(program.bits.or(&[]), [4, 3]);
    assert_eq!(
        (program.lr, program.seed, program.symmetric),
        (0.5, 3, true)
    );
    assert_eq!(program.targets, ["a", "b"]);
    assert_eq!(program.group_size, Some(GroupSize(Some(64))));
    let line = "program --config=run.toml --bits 2 --lr=0.25 --targets c,d";
    let (program, _) = parsed(file, line).unwrap();
    assert_eq!(program.bits.or(&[]), [2]);
    assert_eq!((program.lr, program.seed), (0.25, 3));
    assert_eq!(program.targets, ["c", "d"]);
    let (program, _) = parsed("symmetric = false", "program --config run.toml").unwrap();
    assert!(!program.symmetric);
}

#[test]
fn settings_repeat_the_run() {
    let line =
        "program --bits 4,3 --alpha 0.1 --targets c,d --symmetric --group-size 32 --out there";
    let (program, settings) = parsed("", line).unwrap();
    let expected = r#"# How it was made.
version = 1
bits = [4, 3]
lr = 0.001
alpha = 0.1
seed = 7
method = "peqa"
targets = ["c", "d"]
symmetric = true
group-size = 32
"#;
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(String::from).collect();
        lines.sort();
        lines
    };
    let text = settings.text("How it was made.");
    assert_eq!(sorted(&text), sorted(expected));
    let (again, same) = parsed(&text, "program --config run.toml --out elsewhere").unwrap();
    assert_eq!(same, settings);
    assert_eq!(settings.difference(&same, &[]), None);
    assert_eq!((again.lr, again.alpha), (program.lr, program.alpha));
    // Without the default of an option that the others exclude.
    let (_, settings) = parsed("", "program --preset paper").unwrap();
    let text = settings.text("");
    assert!(
        text.contains("preset = \"paper\"") && !text.contains("method"),
        "{text}"
    );
    assert!(parsed(&text, "program --config run.toml").is_ok());
}

#[test]
fn settings_differ_by_name() {
    let settings = |line: &str| parsed("", line).unwrap().1;
    let was = settings("program --lr 0.5 --seed 1");
    let now = settings("program --lr 0.25 --seed 1 --alpha 2");
    assert_eq!(
        was.difference(&now, &["alpha"]).unwrap(),
        "`lr` was 0.5, now it is 0.25"
    );
    assert_eq!(
        was.difference(&now, &["lr"]).unwrap(),
        "`alpha` was not given, now it is 2"
    );
    let mut now = was.clone();
    now.set("lr", 0.5);
    assert_eq!(was, now);
}

#[test]
fn what_is_wrong_with_a_file_is_said() {
    let cases = [
        ("version = 2", "version 2 is not one"),
        ("version = \"1\"", "version \"1\" is not one"),
        ("lr = ", "line 1, column 6"),
        ("method = \"a\"\nlr = 1\nlr = 2", "duplicate key"),
        (
            "group_size = 32",
            "unknown key `group_size`; like it: `group-size`",
        ),
        ("zzz = 32", "unknown key `zzz`; --help"),
        ("config = \"other.toml\"", "unknown key `config`"),
        ("symmetric = 1", "`symmetric` is true or false"),
        ("lr = true", "`lr` takes text or numbers"),
        ("lr = [0.1, 0.2]", "`lr` takes one value"),
        ("lr = \"fast\"", "invalid value 'fast' for '--lr <LR>'"),
        ("[lr]\nx = 1", "`lr` takes text or numbers"),
        ("preset = \"a\"\nmethod = \"b\"", "cannot be used with"),
    ];
    for (file, part) in cases {
        let error = parsed(file, "program --config run.toml").unwrap_err();
        assert!(error.contains(part), "{file}: {error}");
    }
    let error = parsed("", "program --config none.toml").unwrap_err();
    assert!(error.contains("`none.toml`: No such file"), "{error}");
    let error = parsed("", "program --config run.toml --config run.toml").unwrap_err();
    assert!(error.contains("multiple times"), "{error}");
    let error = parsed("", "program --config").unwrap_err();
    assert!(error.contains("a value is required"), "{error}");
}
