//! What the programs refuse before they read a weight: the models here lack one that no refusal needs.
#![cfg(feature = "flex")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::Device;
use examples::embedded::{Architecture, write};
use quant_core::Rtn;
use tempfile::TempDir;
use tensor_files::{LazyTensor, TensorFile};

/// The tensor that is missing.
const MISSING: &str = "model.norm.weight";

struct Place {
    dir: TempDir,
}

impl Place {
    /// A dense model in `dense`, the same packed in `packed`, a text of one line, and a longer one.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Self { dir };
        let whole = place.path("whole");
        fs::create_dir(&whole).unwrap();
        let whole = write(&whole, Architecture::Llama).unwrap();
        let mut lm = models::load(&whole, &Device::flex()).unwrap();
        let dense = place.path("dense");
        models::save(&lm, &dense).unwrap();
        lm.certificate = None;
        let rtn = Rtn::new().with_group_size(32);
        models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
        let packed = place.path("packed");
        models::save(&lm, &packed).unwrap();
        [dense, packed].iter().for_each(|dir| remove(dir));
        fs::write(place.path("short"), "A word.\n").unwrap();
        let text = examples::corpus::text(examples::corpus::Dialect::Plain, 20_000, 1);
        fs::write(place.path("long"), text).unwrap();
        fs::create_dir(place.path("taken")).unwrap();
        fs::write(place.path("taken/file"), "").unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a program in the directory, and returns its error.
    fn error(&self, command: &str) -> String {
        let mut words = command.split(' ');
        let mut program = std::env::current_exe().unwrap();
        // From target/PROFILE/deps/refusals-HASH to target/PROFILE/examples/NAME.
        program.pop();
        program.pop();
        program.extend(["examples", words.next().unwrap()]);
        let output = Command::new(program)
            .args(words)
            .args(["--device", "flex"])
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{command}: {error}");
        error
    }
}

/// Removes a tensor from the file of a directory.
fn remove(dir: &Path) {
    let path = dir.join("model.safetensors");
    let mut file = TensorFile::open(&path).unwrap();
    let names = file.names();
    assert!(names.iter().any(|name| name == MISSING));
    let kept = names.into_iter().filter(|name| name != MISSING);
    let tensors: Vec<(String, LazyTensor)> = kept
        .map(|name| {
            let tensor = match file.shape(&name).unwrap().len() {
                1 => {
                    let (values, dims) = file.floats::<1>(&name).unwrap();
                    LazyTensor::floats(dims, move || values.clone())
                }
                _ if name.ends_with("qweight") => {
                    let (values, dims) = file.words::<2>(&name).unwrap();
                    LazyTensor::words(dims, move || values.clone())
                }
                _ => {
                    let (values, dims) = file.floats::<2>(&name).unwrap();
                    LazyTensor::floats(dims, move || values.clone())
                }
            };
            (name, tensor)
        })
        .collect();
    drop(file);
    tensor_files::write_tensors(&path, tensors).unwrap();
}

#[test]
fn what_headers_and_texts_tell_is_refused_before_weights_are_read() {
    let place = Place::new();
    let adapt = "adapt --seq-len 64 --model dense --train long --eval long";
    let packed = "adapt --seq-len 64 --model packed --train long --eval long";
    let init =
        "loftq_init --seq-len 64 --model dense --train long --eval long --bits 4 --group-size 32";
    let refusals = [
        // The weights are read when nothing is to be refused.
        (adapt.to_string(), MISSING),
        (packed.to_string(), MISSING),
        (format!("{init} --method loftq"), MISSING),
        // Formats and methods.
        (
            format!("{adapt} --bits 3 --format bitsandbytes"),
            "NF4 and FP4",
        ),
        (
            format!("{adapt} --method lora --format bitsandbytes --group-size 48"),
            "no blocks of",
        ),
        (
            format!("{adapt} --method qlora --format gptq-v2"),
            "GPTQ's grids are uniform",
        ),
        (
            format!("{adapt} --method qa-hira --format gptq-v2"),
            "--allow-rounding",
        ),
        (
            format!("{adapt} --method peqa-zeros --format gptq-v2"),
            "--allow-rounding",
        ),
        (format!("{adapt} --method qa-lora --rank 200"), "rank 200"),
        (format!("{adapt} --preset qa-lora"), "rank 64"),
        (format!("{adapt} --targets k_prj"), "k_prj"),
        (format!("{adapt} --bits 5"), "not 5"),
        (format!("{packed} --bits 4"), "is packed already"),
        (
            format!("{packed} --method lora --rank 500"),
            "a rank of 500",
        ),
        (
            format!("{init} --method loftq --format bitsandbytes --out new"),
            "NF4 and FP4",
        ),
        (
            format!("{init} --method apiq --format gptq-v2 --out new"),
            "ApiQ",
        ),
        // Outputs.
        (format!("{adapt} --out taken"), "is not an empty directory"),
        (
            format!("{init} --method loftq --out taken"),
            "is not an empty directory",
        ),
        // Texts.
        (adapt.replace("eval long", "eval short"), "the --eval text"),
        (
            adapt.replace("train long", "train short"),
            "the --train text",
        ),
        (format!("{adapt} --base short"), "the --base text"),
        (adapt.replace("train long", "train none"), "none"),
        (adapt.replace("seq-len 64", "seq-len 100000"), "100000"),
        (init.replace("eval long", "eval short"), "the --eval text"),
        (
            "adapt --model dense --data none --template gsm8k".into(),
            "none",
        ),
        ("adapt --model dense --data long".into(), "--template"),
    ];
    for (command, part) in refusals {
        let error = place.error(&command);
        assert!(error.contains(part), "{command}: {error}");
        let is_early = part == MISSING || !error.contains(MISSING);
        assert!(is_early, "{command}: {error}");
        assert!(!place.path("new").exists(), "{command}");
    }
}
