//! Certificates on another kind of processor.
#![cfg(feature = "flex")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use burn::tensor::Device;
use examples::corpus::{self, Dialect};
use examples::embedded::{self, Architecture};
use loftq::Loftq;
use models::{LlamaConfig, Model, Pretrained};
use peft::{Adapters, Certificate, FitConfig, Lora, OffGrid, Peqa};
use quant_core::{NormalFloat, Optq, Quantizer, Rtn};

/// The variable with the folder that the processor writes to.
const OWN: &str = "PROCESSOR_FOLDER";
/// The variable with the folder that the first processor wrote.
const FIRST: &str = "FIRST_PROCESSOR_FOLDER";

/// Merged models whose bits depend on no product of floats, which instruction sets sum in other orders.
const EXACT: [&str; 2] = ["rtn-peqa", "nf4-peqa"];
/// Those that do: of a decomposition, of OPTQ, of training.
const ROUNDED: [&str; 3] = ["loftq-lora", "optq-peqa", "tuned"];

fn folder(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).map(PathBuf::from)
}

/// Merges, saves with the certificate, and checks the directory.
fn certify(mut lm: Pretrained, off_grid: OffGrid, dir: &Path) {
    lm.certificate = Some(peft::merge_with(&mut lm.model, off_grid).unwrap());
    models::save(&lm, dir).unwrap();
    models::load_verified(dir, &Device::flex()).unwrap();
}

/// What one processor does: it checks the models of the first one, and makes its own.
#[test]
fn a_processor_makes_and_checks_certified_models() {
    let device = Device::flex();
    let scratch = tempfile::tempdir().unwrap();
    let own = folder(OWN).unwrap_or_else(|| scratch.path().join("own"));
    fs::create_dir_all(&own).unwrap();
    let first = folder(FIRST).unwrap_or_else(|| own.clone());
    if first != own {
        for name in EXACT.into_iter().chain(ROUNDED) {
            let lm = models::load_verified(first.join(name), &device).unwrap();
            assert!(lm.certificate.is_some());
        }
    }

    // Small, because an emulated processor is slow, with the tokenizer of the embedded model.
    let embedded = embedded::write(scratch.path(), Architecture::Llama).unwrap();
    let vocab_size = models::load(&embedded, &device)
        .unwrap()
        .model
        .config()
        .vocab_size();
    let config = LlamaConfig::default()
        .with_vocab_size(vocab_size)
        .with_hidden_size(64)
        .with_intermediate_size(96)
        .with_num_hidden_layers(2)
        .with_num_attention_heads(4)
        .with_num_key_value_heads(2)
        .with_head_dim(16);
    let model = Model::init(config, 0, &device);
    let source = scratch.path().join("base");
    let new = Pretrained::new(model, &embedded.join("tokenizer.json")).unwrap();
    models::save(&new, &source).unwrap();
    let base = models::load(&source, &device).unwrap();
    let text = corpus::text(Dialect::Plain, 2_000, 20);
    let batches = base.windows(&text, 16).unwrap().batches(2, &device);
    let batches = &batches[..2];
    let quantized = |quantizer: &dyn Quantizer| {
        let mut lm = base.clone();
        models::quantize(&mut lm.model, &quantizer, batches, |_| {}).unwrap();
        lm
    };
    let config = FitConfig::new().with_steps(2).with_learning_rate(1e-2);
    let tuned = |quantizer: &dyn Quantizer| {
        let mut lm = quantized(quantizer);
        peft::attach(&mut lm.model, &Peqa::new()).unwrap();
        peft::fit(&mut lm.model, batches, &config, |_, _| {}).unwrap();
        lm
    };

    let rtn = Rtn::new().with_bits(4).with_group_size(32);
    let lm = tuned(&rtn);
    let adapters = own.join("rtn-adapters");
    Adapters::of(&lm.model).unwrap().save(&adapters).unwrap();
    certify(lm, OffGrid::Refuse, &own.join("tuned"));
    let nf4 = NormalFloat::new();
    let adapters = own.join("nf4-adapters");
    Adapters::of(&tuned(&nf4).model)
        .unwrap()
        .save(&adapters)
        .unwrap();
    // The merge of the first processor's adapters, into codes that this one made.
    for (name, quantizer) in [("rtn", &rtn as &dyn Quantizer), ("nf4", &nf4)] {
        let mut lm = quantized(quantizer);
        let adapters = Adapters::load(first.join(format!("{name}-adapters")), &device).unwrap();
        peft::activate(&mut lm.model, &adapters).unwrap();
        certify(lm, OffGrid::Refuse, &own.join(format!("{name}-peqa")));
    }
    let optq = Optq::new().with_bits(4).with_group_size(32);
    certify(tuned(&optq), OffGrid::Refuse, &own.join("optq-peqa"));
    let mut lm = base.clone();
    loftq::init(&mut lm.model, &Loftq::new(Lora::new(4)), &nf4, &[], |_| {}).unwrap();
    certify(lm, OffGrid::Dense, &own.join("loftq-lora"));
}

/// A certificate is of parameters, which another processor reads as they are. Quantizing without products
/// and PEQA's merge give the same parameters there.
#[test]
#[ignore = "needs qemu-x86_64, which emulates processors of other kinds"]
fn another_processor_agrees_with_this_one() {
    let parent = tempfile::tempdir().unwrap();
    let own = |name: &str| parent.path().join(name);
    let first = own("native");
    let run = |name: &str, emulator: &[&str]| {
        let program = env::current_exe().unwrap();
        let (launcher, options) = match emulator.split_first() {
            Some((launcher, options)) => (PathBuf::from(launcher), options),
            None => (program.clone(), &[][..]),
        };
        let mut command = Command::new(launcher);
        command.args(options);
        if !emulator.is_empty() {
            command.arg(program);
        }
        let status = command
            .args(["--exact", "a_processor_makes_and_checks_certified_models"])
            .env(OWN, own(name))
            .env(FIRST, &first)
            .status()
            .unwrap();
        assert!(status.success(), "{name}");
    };
    run("native", &[]);
    // Without AVX, and with AVX2 and without AVX-512.
    for cpu in ["Nehalem", "Haswell"] {
        run(cpu, &["qemu-x86_64", "-cpu", cpu]);
        let is_same = |name: &str| {
            let load =
                |dir: &Path| Certificate::load(dir.join(name).join("certificate.json")).unwrap();
            load(&own(cpu)) == load(&first)
        };
        for name in EXACT {
            assert!(is_same(name), "{name} on {cpu}");
        }
        for name in ROUNDED {
            let is_same = if is_same(name) {
                "the same bits"
            } else {
                "other roundings"
            };
            eprintln!("{name}: made anew on {cpu}, {is_same}");
        }
    }
}
