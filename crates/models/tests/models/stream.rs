//! Models that are quantized from files to files.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use burn::tensor::{Device, Distribution, Tensor};
use models::{
    CheckpointError, CheckpointFormat, Config, Error, GptqVersion, StreamError, StreamStep,
    Streaming, load, load_verified, quantize, quantize_head, quantize_to, save_as, save_dense,
};
use peft::{Batch, PerLayer, Recipe};
use proptest::prelude::*;
use quant_core::{
    DoubleQuant, Format, Gram, Needs, NormalFloat, Optq, Order, Quantized, Quantizer, Rtn,
};
use safetensors::{Dtype, SafeTensors};
use tensor_files::FloatType;

use super::fixtures::*;
use super::quantize::llama_config;

/// The tensors of all files of a directory.
fn all_tensors(dir: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|of| of == "safetensors") {
            for (name, tensor) in read_tensors(&path) {
                assert!(all.insert(name, tensor).is_none());
            }
        }
    }
    all
}

/// The other files, but the index and the sums, which depend on the files of tensors.
fn other_files(dir: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if !name.contains(".safetensors") && name != "SHA256SUMS" {
            all.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
    all
}

/// All files with their bytes.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let file = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        (name, fs::read(entry.path()).unwrap())
    };
    entries.map(file).collect()
}

fn some_batches(vocab_size: usize) -> Vec<Batch> {
    let device = Device::flex();
    device.seed(5);
    let all = Distribution::Uniform(0.0, vocab_size as f64);
    let batch = |_| Batch::new(Tensor::<2>::random([2, 16], all, &device).int()).unwrap();
    (0..3).map(batch).collect()
}

/// A recipe that leaves a layer dense.
struct But<'a>(&'a dyn Quantizer, &'a str);

impl Recipe for But<'_> {
    fn quantizer(&self, path: &str) -> Option<&dyn Quantizer> {
        (!path.ends_with(self.1)).then_some(self.0)
    }
}

fn streaming(format: CheckpointFormat) -> Streaming<'static> {
    Streaming::new(&Device::flex()).with_format(format)
}

/// Quantizers with the formats that hold what they give.
fn quantizers() -> Vec<(Box<dyn Quantizer>, CheckpointFormat)> {
    let gptq = CheckpointFormat::Gptq(GptqVersion::V2);
    let optq = Optq::new().with_group_size(8);
    vec![
        (
            Box::new(Rtn::new().with_bits(3)),
            CheckpointFormat::QuantCore,
        ),
        (
            Box::new(
                NormalFloat::new()
                    .with_block_size(8)
                    .with_double_quant(DoubleQuant::dynamic()),
            ),
            CheckpointFormat::QuantCore,
        ),
        (
            Box::new(optq.with_order(Order::DescendingRegrouped)),
            CheckpointFormat::QuantCore,
        ),
        (
            Box::new(optq.with_order(Order::Natural).with_drift(0.25)),
            CheckpointFormat::QuantCore,
        ),
        (
            Box::new(
                Optq::new()
                    .with_bits(8)
                    .with_group_size(4)
                    .with_f16_scales(true),
            ),
            gptq,
        ),
        (
            Box::new(NormalFloat::new().with_block_size(64)),
            CheckpointFormat::Bitsandbytes,
        ),
    ]
}

/// Compares a streamed directory with one that is loaded, quantized and saved.
fn check(
    dense: &Path,
    recipe: &impl Recipe,
    batches: &[Batch],
    format: CheckpointFormat,
    head: Option<&dyn Quantizer>,
) {
    let out = tempfile::tempdir().unwrap();
    let mut lm = load(dense, &Device::flex()).unwrap();
    lm.certificate = None;
    let mut expected = quantize(&mut lm.model, recipe, batches, |_| {}).unwrap();
    let mut settings = streaming(format);
    if let Some(head) = head {
        settings = settings.with_head(head);
        expected.push(quantize_head(&mut lm.model, head).unwrap());
    }
    let whole = out.path().join("whole");
    save_as(&lm, &whole, format).unwrap();

    let streamed = out.path().join("streamed");
    let (mut seen, mut blocks, mut n_written) = (Vec::new(), Vec::new(), 0);
    let found = quantize_to(
        dense,
        &streamed,
        recipe,
        batches,
        &settings,
        |step| match step {
            StreamStep::Quantized(layer) => seen.push(layer.clone()),
            StreamStep::Block { index } => blocks.push(index),
            StreamStep::Written { dir, layers } => {
                assert!(dir.ends_with("streamed.partial/files"));
                n_written = layers.len();
            }
            step => panic!("{step:?}"),
        },
    );
    let found = found.unwrap();
    assert_eq!(found, seen);
    assert_eq!(n_written, seen.len());
    assert_eq!(
        blocks,
        (0..lm.model.config().num_hidden_layers()).collect::<Vec<_>>()
    );
    let [found, expected] = [found, expected].map(|layers| {
        let layers = layers.into_iter();
        layers
            .map(|layer| peft::LayerReport {
                seconds: 0.0,
                ..layer
            })
            .collect::<Vec<_>>()
    });
    assert_eq!(found, expected);
    assert_eq!(all_tensors(&streamed), all_tensors(&whole));
    assert_eq!(other_files(&streamed), other_files(&whole));
    load_verified(&streamed, &Device::flex()).unwrap();
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 2);
}

proptest! {
    #![proptest_config(cases(24))]

    /// Models of either architecture, dense in any type of float.
    #[test]
    fn a_streamed_model_is_the_saved_one(
        config in configs(),
        float in prop::sample::select(vec![FloatType::F32, FloatType::F16, FloatType::Bf16]),
        at in 0..4usize,
        seed in 0..100u64,
        with_head in any::<bool>(),
        left in prop::sample::select(vec!["", "q_proj", "1.fc1"]),
    ) {
        let (dir, lm) = pretrained(config, seed);
        let dense = dir.path().join("dense");
        save_dense(&lm, &dense, float).unwrap();
        let (quantizer, format) = &quantizers()[at];
        let batches = some_batches(16);
        let head = head_quantizer(at % 3);
        let head = with_head.then_some(&*head);
        let needs = quantizer.needs();
        let recipe = But(quantizer, if left.is_empty() { "none" } else { left });
        check(&dense, &recipe, &batches, *format, head);
        if needs == Needs::Nothing {
            check(&dense, &recipe, &[], *format, head);
        }
    }
}

/// In the formats of other programs, and on any number of threads.
#[test]
fn formats_of_others_are_streamed() {
    let config: Config = llama_config()
        .with_hidden_size(64)
        .with_intermediate_size(128)
        .with_num_key_value_heads(4)
        .with_head_dim(16)
        .into();
    let (dir, lm) = pretrained(config, 3);
    let dense = dir.path().join("dense");
    save_dense(&lm, &dense, FloatType::Bf16).unwrap();
    let batches = some_batches(48);
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| {
            for (quantizer, format) in &quantizers()[4..] {
                check(&dense, quantizer, &batches, *format, None);
                check(
                    &dense,
                    &But(quantizer, "1.mlp.up_proj"),
                    &batches,
                    *format,
                    None,
                );
            }
        });
    }
}

/// The models of the tests, packed ones included: their packed layers stay as they are.
#[test]
fn golden_models_are_streamed() {
    for name in [
        "llama_gqa",
        "llama_mha_tied",
        "llama_bf16",
        "opt_125m_style",
        "opt_350m_style",
    ] {
        let batches = some_batches(32);
        let optq = Optq::new().with_group_size(16);
        check(
            &golden(name),
            &optq,
            &batches,
            CheckpointFormat::QuantCore,
            None,
        );
        check(
            &golden(name),
            &Rtn::new(),
            &[],
            CheckpointFormat::QuantCore,
            None,
        );
    }
    for name in ["llama_gptq_w4_g32_sym", "llama_nf4_dq"] {
        let head = Rtn::new().with_group_size(32);
        let none = PerLayer::default();
        check(
            &golden(name),
            &none,
            &[],
            CheckpointFormat::QuantCore,
            Some(&head),
        );
    }
}

/// Fails at a call; with the settings of the quantizer in it.
struct Failing<'a, Q>(&'a Q, Cell<usize>);

impl<Q: Quantizer> std::fmt::Debug for Failing<'_, Q> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl<Q: Quantizer> Quantizer for Failing<'_, Q> {
    fn format(&self) -> quant_core::Result<Format> {
        self.0.format()
    }

    fn needs(&self) -> Needs {
        self.0.needs()
    }

    fn quantize(&self, weight: Tensor<2>, gram: Option<&Gram>) -> quant_core::Result<Quantized> {
        let Some(left) = self.1.get().checked_sub(1) else {
            return Err(quant_core::Error::BeyondF16 {
                scale: 1e9,
                group: 0,
                column: 0,
            });
        };
        self.1.set(left);
        self.0.quantize(weight, gram)
    }
}

struct Case<Q = Optq> {
    dir: tempfile::TempDir,
    dense: std::path::PathBuf,
    out: std::path::PathBuf,
    batches: Vec<Batch>,
    quantizer: Q,
    format: CheckpointFormat,
    whole: BTreeMap<String, Vec<u8>>,
}

/// A model of three blocks, and its files when nothing disturbs it.
fn case() -> Case {
    let optq = Optq::new()
        .with_group_size(8)
        .with_order(Order::Natural)
        .with_drift(0.25);
    let config = llama_config().with_num_hidden_layers(3);
    Case::new(config, FloatType::F16, optq, CheckpointFormat::QuantCore)
}

impl<Q: Quantizer> Case<Q> {
    fn new(
        config: impl Into<Config>,
        float: FloatType,
        quantizer: Q,
        format: CheckpointFormat,
    ) -> Self {
        let (dir, lm) = pretrained(config, 3);
        let dense = dir.path().join("dense");
        save_dense(&lm, &dense, float).unwrap();
        let mut case = Self {
            out: dir.path().join("whole"),
            batches: some_batches(lm.model.config().vocab_size()),
            dense,
            quantizer,
            format,
            whole: BTreeMap::new(),
            dir,
        };
        case.go_on().0.unwrap();
        case.whole = files(&case.out);
        case.out = case.dir.path().join("out");
        case
    }

    fn settings(&self) -> Streaming<'static> {
        streaming(self.format).with_resume(true)
    }

    /// Begins, and fails at a layer.
    fn fail(&self, after: usize) -> Error {
        let (failing, settings) = (Failing(&self.quantizer, Cell::new(after)), self.settings());
        let (dense, batches) = (&self.dense, &self.batches);
        quantize_to(dense, &self.out, &failing, batches, &settings, |_| {}).unwrap_err()
    }

    fn go_on(&self) -> (models::Result<Vec<peft::LayerReport>>, Option<usize>) {
        let (quantizer, settings) = (&self.quantizer, self.settings());
        let (dense, batches) = (&self.dense, &self.batches);
        let mut resumed = None;
        let done = quantize_to(dense, &self.out, quantizer, batches, &settings, |step| {
            if let StreamStep::Resumed { n_blocks } = step {
                resumed = Some(n_blocks);
            }
        });
        (done, resumed)
    }

    fn partial(&self, name: &str) -> std::path::PathBuf {
        self.out.with_file_name("out.partial").join(name)
    }
}

/// A layer that is refused keeps the blocks before it, and what goes on from there is the same model.
#[test]
fn a_run_that_failed_goes_on() {
    let case = case();
    for (after, n_blocks) in [
        (0, None),
        (6, None),
        (7, Some(1)),
        (13, Some(1)),
        (20, Some(2)),
    ] {
        let error = case.fail(after);
        let block = format!("model.layers.{}", after / 7);
        assert_says(&error, &[&block]);
        assert!(!case.out.exists());
        let (done, resumed) = case.go_on();
        assert_eq!(done.unwrap().len(), 21);
        assert_eq!(resumed, n_blocks, "{after}");
        assert_eq!(files(&case.out), case.whole, "{after}");
        assert!(!case.partial("").exists());
        fs::remove_dir_all(&case.out).unwrap();
    }
    // One that goes on may fail again.
    case.fail(3);
    case.fail(7);
    case.fail(7);
    assert_eq!(case.go_on().1, Some(2));
    assert_eq!(files(&case.out), case.whole);
}

/// OPT, and the formats of other programs: after each block, the bytes of an undisturbed run.
#[test]
fn runs_of_every_architecture_and_format_go_on() {
    let llama = || {
        let config = llama_config().with_hidden_size(64).with_head_dim(16);
        let config = config.with_intermediate_size(128).with_num_hidden_layers(3);
        Config::from(config.with_num_key_value_heads(4))
    };
    let wide = opt().with_vocab_size(48).with_hidden_size(64);
    let wide = wide.with_ffn_dim(128).with_num_hidden_layers(3);
    let narrow = wide.clone().with_word_embed_proj_dim(24);
    let narrow = narrow.with_do_layer_norm_before(false);
    let wide = wide.with_word_embed_proj_dim(64);
    let optq = Optq::new().with_group_size(8).with_order(Order::Natural);
    let halves = Optq::new().with_bits(8).with_group_size(16);
    let halves = halves.with_f16_scales(true);
    let regrouped = halves.with_order(Order::DescendingRegrouped);
    let nf = NormalFloat::new().with_block_size(64);
    let double = nf.with_double_quant(DoubleQuant::dynamic());
    let exact = CheckpointFormat::QuantCore;
    let [v1, v2] = [GptqVersion::V1, GptqVersion::V2].map(CheckpointFormat::Gptq);
    let bnb = CheckpointFormat::Bitsandbytes;
    let cases: [(Config, Box<dyn Quantizer>, CheckpointFormat); 8] = [
        (wide.clone().into(), Box::new(optq), exact),
        (
            narrow.clone().into(),
            Box::new(optq.with_drift(0.25)),
            exact,
        ),
        (wide.clone().into(), Box::new(halves), v2),
        (narrow.into(), Box::new(nf), bnb),
        (llama(), Box::new(halves), v2),
        (llama(), Box::new(regrouped.with_symmetric(true)), v1),
        (llama(), Box::new(nf), bnb),
        (wide.into(), Box::new(double), bnb),
    ];
    for (config, quantizer, format) in cases {
        let n_layers = config.projections().len() / config.num_hidden_layers();
        let case = Case::new(config, FloatType::F32, quantizer, format);
        for after in 0..3 {
            case.fail(n_layers * after);
            let (done, resumed) = case.go_on();
            assert_eq!(done.unwrap().len(), 3 * n_layers, "{format} {after}");
            assert_eq!(resumed, (after > 0).then_some(after), "{format} {after}");
            assert!(files(&case.out) == case.whole, "{format} {after}");
            fs::remove_dir_all(&case.out).unwrap();
        }
    }
}

/// Weights that stay dense are in memory in another type than in the file that is written.
#[test]
fn layers_that_stay_dense_give_the_same_inputs_in_any_type() {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dense = dir.path().join("dense");
    let lm = load(golden("llama_bf16"), &Device::flex()).unwrap();
    save_dense(&lm, &dense, FloatType::F32).unwrap();
    let (batches, optq) = (some_batches(16), Optq::new().with_group_size(16));
    let settings = streaming(CheckpointFormat::QuantCore).with_resume(true);
    let run = |optq: &dyn Quantizer, name: &str| {
        let recipe = But(optq, "0.mlp.up_proj");
        quantize_to(
            &dense,
            out.path().join(name),
            &recipe,
            &batches,
            &settings,
            |_| {},
        )
    };
    run(&optq, "whole").unwrap();
    let failing = Failing(&optq, Cell::new(6));
    run(&failing, "out").unwrap_err();
    run(&optq, "out").unwrap();
    assert!(files(&out.path().join("out")) == files(&out.path().join("whole")));
}

/// A recipe that leaves a block dense, whose file is then larger than those of the others.
struct ButBlock(Optq, String);

impl Recipe for ButBlock {
    fn quantizer(&self, path: &str) -> Option<&dyn Quantizer> {
        (!path.starts_with(&self.1)).then_some(&self.0)
    }
}

/// No room for the first block, one in the middle or the last one: nothing that was written before is lost.
/// The test runs itself with a limit on the size of a file, which the system enforces as it does that of a
/// disk.
#[cfg(target_os = "linux")]
#[test]
fn a_block_without_room_keeps_those_before() {
    const TEST: &str = "stream::a_block_without_room_keeps_those_before";
    const DIR: &str = "STREAM_WITHOUT_ROOM";
    const BLOCK: &str = "STREAM_WIDE_BLOCK";
    let run = |dir: &Path, block: usize, out: &str| {
        let optq = Optq::new().with_group_size(16);
        let recipe = ButBlock(optq, format!("model.layers.{block}."));
        let settings = streaming(CheckpointFormat::QuantCore).with_resume(true);
        let (dense, out) = (dir.join("dense"), dir.join(out));
        let mut resumed = 0;
        let done = quantize_to(dense, out, &recipe, &some_batches(48), &settings, |step| {
            if let StreamStep::Resumed { n_blocks } = step {
                resumed = n_blocks;
            }
        });
        done.map(|layers| (layers.len(), resumed))
    };
    if let Some(dir) = std::env::var_os(DIR) {
        let block = std::env::var(BLOCK).unwrap().parse().unwrap();
        let error = run(Path::new(&dir), block, "out").unwrap_err();
        assert_says(error, &["File too large"]);
        return;
    }
    let config = llama_config().with_hidden_size(64).with_head_dim(16);
    let config = config.with_intermediate_size(128).with_num_hidden_layers(3);
    let (dir, lm) = pretrained(config.with_num_key_value_heads(4), 3);
    save_dense(&lm, dir.path().join("dense"), FloatType::F32).unwrap();
    for block in 0..3 {
        let whole = dir.path().join("whole");
        run(dir.path(), block, "whole").unwrap();
        let expected = files(&whole);
        // In units of 512 bytes. A dense block has 160 KiB, a packed one an eighth of that.
        let limited = "trap '' XFSZ; ulimit -f 200; exec \"$0\" \"$@\"";
        let limited = Command::new("sh")
            .args(["-c", limited])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", TEST])
            .env(DIR, dir.path())
            .env(BLOCK, block.to_string())
            .stdout(Stdio::null())
            .status();
        assert!(limited.unwrap().success(), "{block}");
        let out = dir.path().join("out");
        assert!(!out.exists());
        assert_eq!(run(dir.path(), block, "out").unwrap(), (14, block));
        assert!(files(&out) == expected, "{block}");
        fs::remove_dir_all(&out).unwrap();
        fs::remove_dir_all(&whole).unwrap();
    }
}

#[test]
fn another_run_does_not_go_on() {
    let case = case();
    case.fail(8);
    let run = |recipe: &dyn Quantizer, batches: &[Batch], settings: &Streaming| {
        let recipe = But(recipe, "none");
        quantize_to(&case.dense, &case.out, &recipe, batches, settings, |_| {}).unwrap_err()
    };
    let settings = streaming(CheckpointFormat::QuantCore);
    let error = run(&case.quantizer, &case.batches, &settings);
    assert!(
        matches!(error, Error::Stream(StreamError::Unfinished { .. })),
        "{error}"
    );
    let settings = settings.with_resume(true);
    let error = run(&case.quantizer.with_bits(3), &case.batches, &settings);
    assert_says(
        error,
        &[
            "quantizer of `model.layers.0.mlp.down_proj`",
            "bits: 4",
            "bits: 3",
        ],
    );
    let error = run(&case.quantizer, &case.batches[1..], &settings);
    assert_says(
        error,
        &["number of batches of the calibration", "was 3, now it is 2"],
    );
    let mut other = case.batches.clone();
    other.swap(1, 2);
    assert_says(
        run(&case.quantizer, &other, &settings),
        &["batch 1 of the calibration"],
    );
    let gptq = settings
        .clone()
        .with_format(CheckpointFormat::Gptq(GptqVersion::V2));
    let f16 = case.quantizer.with_f16_scales(true);
    let narrow = run(&f16, &case.batches, &gptq);
    assert!(
        matches!(narrow, Error::Stream(StreamError::Differs { .. })),
        "{narrow}"
    );

    let config = case.dense.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("10000.0", "20000.0")).unwrap();
    assert_says(
        run(&case.quantizer, &case.batches, &settings),
        &["file `config.json`"],
    );
    fs::write(&config, text).unwrap();

    // The same header, and a value of the first block that is another.
    let path = case.dense.join("model.safetensors");
    let before = fs::read(&path).unwrap();
    let (n_header, header) = SafeTensors::read_metadata(&before).unwrap();
    let changed = "model.layers.0.mlp.up_proj.weight";
    let mut bytes = before.clone();
    bytes[8 + n_header + header.info(changed).unwrap().data_offsets.0] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = run(&case.quantizer, &case.batches, &settings);
    assert_says(error, &[changed, "has changed since the run began"]);
    fs::write(&path, before).unwrap();

    let journal = case.partial("journal.json");
    let text = fs::read_to_string(&journal).unwrap();
    for damaged in [
        &text[..text.len() / 2],
        "",
        "{}",
        &text.replace("\"version\": 2", "\"version\": 1"),
    ] {
        fs::write(&journal, damaged).unwrap();
        let error = run(&case.quantizer, &case.batches, &settings);
        assert_says(error, &["journal.json"]);
    }
    fs::remove_file(&journal).unwrap();
    let error = run(&case.quantizer, &case.batches, &settings);
    assert!(
        matches!(error, Error::Stream(StreamError::NoJournal { .. })),
        "{error}"
    );
    fs::write(&journal, text).unwrap();
    // Nothing that was refused cost a part.
    assert_eq!(case.go_on().1, Some(1));
    assert_eq!(files(&case.out), case.whole);
}

/// A second process is refused while the first lives, and a finished model is not written again.
#[test]
fn one_place_is_of_one_run() {
    let case = case();
    let settings = streaming(CheckpointFormat::QuantCore).with_resume(true);
    let mut refused = 0;
    quantize_to(
        &case.dense,
        &case.out,
        &case.quantizer,
        &case.batches,
        &settings,
        |_| {
            let again = quantize_to(
                &case.dense,
                &case.out,
                &case.quantizer,
                &case.batches,
                &settings,
                |_| {},
            );
            let error = again.unwrap_err();
            assert!(
                matches!(error, Error::File(tensor_files::Error::OutputBusy { .. })),
                "{error}"
            );
            refused += 1;
        },
    )
    .unwrap();
    // Layers, blocks, and the end.
    assert_eq!(refused, 25);
    let error = case.go_on().0.unwrap_err();
    assert!(
        matches!(error, Error::File(tensor_files::Error::OutputExists { .. })),
        "{error}"
    );
}

/// A file of weights that vanishes or changes while the model is quantized.
#[test]
fn files_that_change_on_the_way_are_found() {
    let case = case();
    let settings = streaming(CheckpointFormat::QuantCore).with_resume(true);
    let path = case.dense.join("model.safetensors");
    let before = fs::read(&path).unwrap();
    let shorter = {
        let mut tensors = read_tensors(&path);
        tensors.remove("model.norm.weight");
        let shorter = case.dense.join("shorter");
        write_tensors(&shorter, &tensors);
        let bytes = fs::read(&shorter).unwrap();
        fs::remove_file(shorter).unwrap();
        bytes
    };
    for after in [
        None,
        Some(shorter),
        Some(before[..before.len() / 2].to_vec()),
    ] {
        let done = quantize_to(
            &case.dense,
            &case.out,
            &case.quantizer,
            &case.batches,
            &settings,
            |step| {
                if let StreamStep::Block { index: 0 } = step {
                    match &after {
                        None => fs::remove_file(&path).unwrap(),
                        Some(bytes) => fs::write(&path, bytes).unwrap(),
                    }
                }
            },
        );
        assert_says(done.unwrap_err(), &["dense"]);
        fs::write(&path, &before).unwrap();
        assert_eq!(case.go_on().1, Some(1));
        assert_eq!(files(&case.out), case.whole);
        fs::remove_dir_all(&case.out).unwrap();
    }
}

/// All that can be known is refused before anything is written.
#[test]
fn refusals_leave_nothing() {
    let case = case();
    let settings = streaming(CheckpointFormat::QuantCore);
    let run = |recipe: &dyn Quantizer, batches: &[Batch], settings: &Streaming| {
        let recipe = But(recipe, "none");
        let error = quantize_to(&case.dense, &case.out, &recipe, batches, settings, |_| {});
        assert!(!case.partial("").exists());
        error.unwrap_err()
    };
    let error = run(&case.quantizer, &[], &settings);
    assert!(
        matches!(error, Error::Peft(peft::Error::NoCalibration)),
        "{error}"
    );
    let beyond = some_batches(4800);
    let error = run(&case.quantizer, &beyond, &settings);
    assert!(
        matches!(error, Error::Peft(peft::Error::Token { .. })),
        "{error}"
    );
    let error = run(&Rtn::new().with_group_size(64), &[], &settings);
    assert!(
        matches!(error, Error::Checkpoint(CheckpointError::Plan { .. })),
        "{error}"
    );
    let gptq = settings
        .clone()
        .with_format(CheckpointFormat::Gptq(GptqVersion::V2));
    let error = run(&NormalFloat::new().with_block_size(8), &[], &gptq);
    assert!(
        matches!(error, Error::Checkpoint(CheckpointError::CannotHold { .. })),
        "{error}"
    );
    let head = NormalFloat::new().with_block_size(8);
    let error = run(&Rtn::new().with_group_size(8), &[], &gptq.with_head(&head));
    assert_says(error, &["lm_head", "uniform"]);
    let none = PerLayer::default();
    let error = quantize_to(&case.dense, &case.out, &none, &[], &settings, |_| {}).unwrap_err();
    assert!(
        matches!(error, Error::Stream(StreamError::NothingToDo)),
        "{error}"
    );

    let path = case.dense.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    let norm = tensors["model.norm.weight"].clone();
    tensors.insert("model.layers.3.mlp.up_proj.weight".into(), norm);
    write_tensors(&path, &tensors);
    let error = run(&Rtn::new(), &[], &settings);
    assert!(
        matches!(
            error,
            Error::Checkpoint(CheckpointError::UnexpectedTensor { .. })
        ),
        "{error}"
    );
    tensors.remove("model.layers.3.mlp.up_proj.weight");
    // A bias that the model lacks, and a tensor that it needs.
    let bias = tensors["model.layers.0.self_attn.q_proj.bias"].clone();
    tensors.insert("model.layers.0.mlp.up_proj.bias".into(), bias);
    write_tensors(&path, &tensors);
    assert_says(
        run(&Rtn::new(), &[], &settings),
        &["model.layers.0.mlp.up_proj.bias"],
    );
    tensors.remove("model.layers.0.mlp.up_proj.bias");
    let norm = tensors.remove("model.norm.weight").unwrap();
    write_tensors(&path, &tensors);
    assert_says(
        run(&Rtn::new(), &[], &settings),
        &["no tensor `model.norm.weight`"],
    );
    tensors.insert("model.norm.weight".into(), norm);
    write_tensors(&path, &tensors);
    let head = Rtn::new().with_group_size(7).with_bits(4);
    let wide = Rtn::new().with_group_size(64);
    let error = run(&head, &[], &settings.clone().with_head(&wide));
    assert_says(error, &["lm_head"]);
    // Scales that the format cannot hold are known once a block is quantized.
    let gptq = streaming(CheckpointFormat::Gptq(GptqVersion::V2));
    let error = run(&Rtn::new().with_group_size(8), &[], &gptq);
    assert_says(error, &["model.layers.0", "f16 does not hold exactly"]);
}

/// What another program left there is not touched.
#[test]
fn a_place_of_somebody_else_is_left_alone() {
    let case = case();
    let file = case.partial("download");
    fs::create_dir(case.partial("")).unwrap();
    fs::write(&file, "half of it").unwrap();
    let error = case.go_on().0.unwrap_err();
    assert_says(error, &["out.partial", "remove it, or choose another name"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "half of it");
}

/// The test runs itself, and kills what it runs at each of its steps, or some time after.
#[test]
fn a_killed_run_goes_on() {
    const TEST: &str = "stream::a_killed_run_goes_on";
    const DIR: &str = "STREAM_TO";
    const AT: &str = "STREAM_AT";
    let settings = streaming(CheckpointFormat::QuantCore).with_resume(true);
    let (dense, optq) = (golden("llama_gqa"), Optq::new().with_group_size(16));
    let batches = some_batches(32);
    let stream = |dir: &Path, on_step: &mut dyn FnMut(StreamStep)| {
        quantize_to(&dense, dir, &optq, &batches, &settings, on_step).unwrap();
    };
    if let Some(dir) = std::env::var_os(DIR) {
        let dir = Path::new(&dir);
        let at: usize = std::env::var(AT).unwrap().parse().unwrap();
        let mut n_steps = 0;
        stream(dir, &mut |_| {
            if n_steps == at {
                fs::write(dir.with_file_name("reached"), "").unwrap();
                // Every fourth step it is killed at once, and else somewhere behind.
                thread::sleep(Duration::from_secs(if at.is_multiple_of(4) {
                    60
                } else {
                    0
                }));
            }
            n_steps += 1;
        });
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let reached = dir.path().join("reached");
    let mut n_steps = 0;
    stream(&whole, &mut |_| n_steps += 1);
    let whole = files(&whole);
    let (mut n_killed, mut resumed) = (0, 0);
    for at in 0..n_steps {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let child = child
            .args(["--exact", TEST])
            .env(DIR, &out)
            .env(AT, at.to_string());
        let mut child = child.stdout(Stdio::null()).spawn().unwrap();
        while !reached.exists() && child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        n_killed += usize::from(!child.wait().unwrap().success());
        let _ = fs::remove_file(&reached);
        if !out.exists() {
            stream(&out, &mut |step| {
                if let StreamStep::Resumed { n_blocks } = step {
                    resumed = resumed.max(n_blocks);
                }
            });
        }
        assert_eq!(files(&out), whole, "{at}");
        assert!(!dir.path().join("out.partial").exists());
        fs::remove_dir_all(&out).unwrap();
    }
    assert!(n_killed >= n_steps / 4 && resumed > 0, "{n_killed} kills");
}
