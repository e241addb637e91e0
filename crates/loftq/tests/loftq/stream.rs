//! Initializations from files to files.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Distribution, Tensor};
use loftq::{
    Apiq, ApiqBlock, BlockAp, Initialization, InitializedLayer, Initializer, Loftq, LqLora, Pissa,
    Qera, Rilq, init,
};
use models::{
    CheckpointFormat, Config, Error, FloatType, GptqVersion, Model, OptConfig, Pretrained,
    StreamError, StreamStep, Streaming, Window, initialize_to, load, load_verified, save_as,
    save_dense,
};
use peft::{Batch, LayerReport, LayerShape, Lora, PerLayer, Recipe, StageMethod, Streams};
use quant_core::{Needs, NormalFloat, Optq, Order, Quantizer, Rtn};
use safetensors::{Dtype, SafeTensors};

use crate::{llama, word_level};

#[path = "../../../models/tests/fixtures/architectures.rs"]
mod architectures;

use architectures::{Sizes, architectures};

/// An initialization of whole models, and of their blocks.
trait Method: Initialization<Model> + Initialization<Window> {}

impl<T: Initialization<Model> + Initialization<Window>> Method for T {}

fn lora() -> Lora {
    Lora::new(3).with_alpha(5.0).with_seed(7)
}

fn rtn() -> Box<dyn Quantizer> {
    Box::new(llama::rtn(2))
}

/// A name, a method and the quantizer of its base.
type Case = (&'static str, Box<dyn Method>, Box<dyn Quantizer>);

/// Every method that looks at a part of a model at a time.
fn methods() -> Vec<Case> {
    let nf = || Box::new(NormalFloat::new().with_block_size(8));
    let optq = Optq::new().with_bits(2).with_group_size(8);
    let cloq = optq.with_order(Order::Natural);
    vec![
        ("qlora", Box::new(lora()), nf()),
        ("loftq", Box::new(Loftq::new(lora())), nf()),
        ("dora", Box::new(Loftq::new(lora().with_dora(true))), rtn()),
        ("biases", Box::new(Loftq::new(lora().with_bias(true))), nf()),
        ("pissa", Box::new(Pissa::new(lora())), nf()),
        ("lq-lora", Box::new(LqLora::new(lora())), rtn()),
        ("qera", Box::new(Qera::new(lora())), rtn()),
        ("cloq", Box::new(Qera::new(lora())), Box::new(cloq)),
        (
            "cloq with drift",
            Box::new(Qera::new(lora())),
            Box::new(cloq.with_drift(0.25)),
        ),
        ("apiq", Box::new(Apiq::new(lora()).with_rounds(3)), rtn()),
        (
            "apiq by block",
            Box::new(ApiqBlock::new(lora()).with_rounds(2)),
            rtn(),
        ),
        (
            "block-ap",
            Box::new(BlockAp::new().with_learning_rates(2e-3, 2e-3)),
            rtn(),
        ),
    ]
}

/// A recipe that leaves a layer dense.
struct But<'a>(&'a dyn Quantizer, &'a str);

impl Recipe for But<'_> {
    fn quantizer(&self, path: &str) -> Option<&dyn Quantizer> {
        (!path.ends_with(self.1)).then_some(self.0)
    }
}

/// A directory with a dense model.
struct Dense {
    root: tempfile::TempDir,
    dir: PathBuf,
}

impl Dense {
    fn new(model: Model, float: FloatType) -> Self {
        let root = tempfile::tempdir().unwrap();
        let tokenizer = root.path().join("tokenizer.json");
        word_level::write_tokenizer(&tokenizer, model.config().vocab_size());
        let lm = Pretrained::new(model, &tokenizer).unwrap();
        let dir = root.path().join("dense");
        save_dense(&lm, &dir, float).unwrap();
        Self { root, dir }
    }

    fn llama(n_blocks: usize) -> Self {
        let Config::Llama(config) = llama::model().config().clone() else {
            unreachable!("a LLaMA");
        };
        let config = config.with_num_hidden_layers(n_blocks);
        Self::new(Model::init(config, 3, &Device::flex()), FloatType::F16)
    }

    fn opt() -> Self {
        let config = OptConfig::default()
            .with_vocab_size(48)
            .with_hidden_size(32)
            .with_ffn_dim(40)
            .with_num_hidden_layers(2)
            .with_num_attention_heads(4)
            .with_max_position_embeddings(64)
            .with_word_embed_proj_dim(24);
        Self::new(Model::init(config, 4, &Device::flex()), FloatType::F32)
    }

    fn out(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }
}

fn batches() -> Vec<Batch> {
    let device = Device::flex();
    device.seed(9);
    let all = Distribution::Uniform(0.0, 48.0);
    let batch = |_| Batch::new(Tensor::<2>::random([2, 12], all, &device).int()).unwrap();
    (0..3).map(batch).collect()
}

fn streaming() -> Streaming<'static> {
    Streaming::new(&Device::flex()).with_resume(true)
}

/// All files in a directory and those in it.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    let inner = |(path, bytes): (PathBuf, Vec<u8>)| {
        let name = path.strip_prefix(dir).unwrap_or(&path).to_path_buf();
        (Path::new(dir.file_name().unwrap()).join(name), bytes)
    };
    all.into_iter().map(inner).collect()
}

/// The directory of the model in an output.
fn base(out: &Path) -> PathBuf {
    let base = out.join("base");
    if base.exists() { base } else { out.into() }
}

/// The files of an output by their paths in it.
fn output(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    if base(out) == out {
        let files = files(out).into_iter();
        let named = files.map(|(path, bytes)| (path.file_name().unwrap().into(), bytes));
        return named.collect();
    }
    let parts = ["base", "adapter"].map(|name| files(&out.join(name)));
    assert_eq!(fs::read_dir(out).unwrap().count(), 2);
    parts.into_iter().flatten().collect()
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of a model, and its other files but the index and the sums, which depend on the files.
fn content(dir: &Path) -> (Tensors, BTreeMap<PathBuf, Vec<u8>>) {
    let (mut tensors, mut others) = (Tensors::new(), BTreeMap::new());
    for (path, bytes) in files(dir) {
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.ends_with(".safetensors") {
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let shape = view.shape().to_vec();
                let tensor = (view.dtype(), shape, view.data().to_vec());
                assert!(tensors.insert(name, tensor).is_none());
            }
        } else if !name.ends_with(".index.json") && name != "SHA256SUMS" {
            others.insert(path, bytes);
        }
    }
    (tensors, others)
}

fn timeless(layers: Vec<InitializedLayer>) -> Vec<InitializedLayer> {
    let layers = layers.into_iter();
    let timeless = layers.map(|layer| InitializedLayer {
        report: LayerReport {
            seconds: 0.0,
            ..layer.report
        },
        ..layer
    });
    timeless.collect()
}

/// Compares what is written block by block with what `init` gives.
fn check(
    name: &str,
    dense: &Dense,
    method: &dyn Method,
    recipe: &dyn Recipe,
    batches: &[Batch],
    format: CheckpointFormat,
) {
    let mut lm = load(&dense.dir, &Device::flex()).unwrap();
    let expected = init(&mut lm.model, method, recipe, batches, |_| {}).unwrap();
    let whole = dense.out("whole");
    let has_adapters = Initialization::<Model>::has_adapters(method);
    if has_adapters {
        let adapters = peft::detach(&mut lm.model).unwrap();
        save_as(&lm, whole.join("base"), format).unwrap();
        adapters.save_hf(whole.join("adapter"), &lm.model).unwrap();
    } else {
        save_as(&lm, &whole, format).unwrap();
    }

    let out = dense.out("streamed");
    let (mut seen, mut blocks, mut n_written) = (Vec::new(), Vec::new(), 0);
    let settings = streaming().with_format(format);
    let initializer = Initializer::new(method, recipe);
    let on_step = |step: StreamStep| match step {
        StreamStep::Initialized(layer) => seen.push(layer.clone()),
        StreamStep::Block { index } => blocks.push(index),
        StreamStep::Written { layers, .. } => n_written = layers.len(),
        step => panic!("{step:?}"),
    };
    let found = initialize_to(&dense.dir, &out, &initializer, batches, &settings, on_step).unwrap();
    assert_eq!(found, seen, "{name}");
    assert_eq!(n_written, seen.len(), "{name}");
    assert_eq!(blocks, [0, 1], "{name}");
    assert_eq!(timeless(found), timeless(expected), "{name}");
    let [(tensors, others), (expected_tensors, expected)] =
        [&out, &whole].map(|dir| content(&base(dir)));
    assert!(tensors == expected_tensors, "{name}");
    let by_name = |files: BTreeMap<PathBuf, Vec<u8>>| -> BTreeMap<_, _> {
        let files = files.into_iter();
        files
            .map(|(path, bytes)| (path.file_name().unwrap().to_owned(), bytes))
            .collect()
    };
    assert!(by_name(others) == by_name(expected), "{name}");
    let mut lm = load_verified(base(&out), &Device::flex()).unwrap();
    assert_eq!(out.join("adapter").exists(), has_adapters, "{name}");
    if has_adapters {
        assert!(
            files(&out.join("adapter")) == files(&whole.join("adapter")),
            "{name}"
        );
        let adapters = peft::Adapters::open(out.join("adapter"), &lm.model).unwrap();
        peft::activate(&mut lm.model, &adapters).unwrap();
    }
    assert_eq!(
        fs::read_dir(dense.root.path()).unwrap().count(),
        4,
        "{name}"
    );
    fs::remove_dir_all(&whole).unwrap();
    fs::remove_dir_all(&out).unwrap();
}

/// On any number of threads, for either architecture.
#[test]
fn a_streamed_initialization_is_the_saved_one() {
    let batches = batches();
    for dense in [Dense::llama(2), Dense::opt()] {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap().install(|| {
                for (name, method, quantizer) in methods() {
                    let format = CheckpointFormat::QuantCore;
                    check(name, &dense, &*method, &quantizer, &batches, format);
                }
            });
        }
    }
}

/// Every architecture.
#[test]
fn a_streamed_initialization_of_any_architecture_is_the_saved_one() {
    let sizes = Sizes {
        vocab: 48,
        positions: 64,
        hidden: 32,
        inner: 40,
        head_dim: 8,
    };
    for config in architectures(sizes) {
        let dense = Dense::new(Model::init(config, 5, &Device::flex()), FloatType::F32);
        for (name, method, quantizer) in methods() {
            let format = CheckpointFormat::QuantCore;
            check(name, &dense, &*method, &quantizer, &batches(), format);
        }
    }
}

/// Without a calibration where none is needed, with a layer that stays dense, with few targets, and in the
/// formats of other programs.
#[test]
fn parts_of_a_model_may_stay_as_they_are() {
    let dense = Dense::llama(2);
    let batches = batches();
    let format = CheckpointFormat::QuantCore;
    for (name, method, quantizer) in methods() {
        let left = But(&quantizer, "1.mlp.up_proj");
        check(name, &dense, &*method, &left, &batches, format);
        if ["qlora", "loftq", "pissa", "lq-lora"].contains(&name) {
            check(name, &dense, &*method, &quantizer, &[], format);
        }
    }
    let few = lora().with_targets(["q_proj", "up_proj"]);
    let methods: [Box<dyn Method>; 3] = [
        Box::new(Loftq::new(few.clone())),
        Box::new(Apiq::new(few.clone()).with_rounds(2)),
        Box::new(ApiqBlock::new(few).with_rounds(2)),
    ];
    for method in methods {
        check("few", &dense, &*method, &rtn(), &batches, format);
    }
    let f16 = llama::rtn(4).with_f16_scales(true);
    let gptq = CheckpointFormat::Gptq(GptqVersion::V2);
    let method = Qera::new(lora());
    check("gptq", &dense, &method, &f16, &batches, gptq);
}

/// The method, but that it fails at a block.
struct Stopping<'a> {
    method: Initializer<'a, dyn Method + 'a>,
    left: Cell<usize>,
}

impl StageMethod<Window> for Stopping<'_> {
    fn recipe(&self) -> &dyn Recipe {
        StageMethod::<Window>::recipe(&self.method)
    }

    fn settings(&self) -> String {
        StageMethod::<Window>::settings(&self.method)
    }

    fn check(&self, layers: &[LayerShape]) -> peft::Result<Needs> {
        StageMethod::<Window>::check(&self.method, layers)
    }

    fn has_adapters(&self) -> bool {
        StageMethod::<Window>::has_adapters(&self.method)
    }

    fn run(
        &self,
        part: &mut Window,
        streams: &mut Streams<'_>,
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> peft::Result<Vec<InitializedLayer>> {
        let Some(left) = self.left.get().checked_sub(1) else {
            return Err(peft::Error::NoAdapters);
        };
        self.left.set(left);
        self.method.run(part, streams, on_layer)
    }
}

/// Begins a run that fails after so many blocks.
fn stop(dense: &Dense, method: &dyn Method, recipe: &dyn Recipe, batches: &[Batch], after: usize) {
    let stopping = Stopping {
        method: Initializer::new(method, recipe),
        left: Cell::new(after),
    };
    let out = dense.out("out");
    let done = initialize_to(&dense.dir, &out, &stopping, batches, &streaming(), |_| {});
    let error = done.unwrap_err();
    assert!(
        matches!(error, Error::Peft(peft::Error::NoAdapters)),
        "{error}"
    );
    assert!(!out.exists());
}

/// Goes on, and returns the blocks that were done.
fn go_on(
    dense: &Dense,
    method: &dyn Method,
    recipe: &dyn Recipe,
    batches: &[Batch],
) -> (models::Result<Vec<InitializedLayer>>, Option<usize>) {
    let (out, mut resumed) = (dense.out("out"), None);
    let initializer = Initializer::new(method, recipe);
    let done = initialize_to(
        &dense.dir,
        &out,
        &initializer,
        batches,
        &streaming(),
        |step| {
            if let StreamStep::Resumed { n_blocks } = step {
                resumed = Some(n_blocks);
            }
        },
    );
    (done, resumed)
}

/// After each block, for every method: the bytes and the reports of an undisturbed run.
#[test]
fn a_run_that_was_stopped_goes_on() {
    let (dense, batches) = (Dense::llama(3), batches());
    for (name, method, quantizer) in methods() {
        for left in ["none", "1.self_attn.o_proj"] {
            let recipe = But(&quantizer, left);
            let whole = dense.out("whole");
            let initializer = Initializer::new(&*method, &recipe);
            let expected = initialize_to(
                &dense.dir,
                &whole,
                &initializer,
                &batches,
                &streaming(),
                |_| {},
            );
            let expected = timeless(expected.unwrap());
            for after in 0..3 {
                stop(&dense, &*method, &recipe, &batches, after);
                let (done, resumed) = go_on(&dense, &*method, &recipe, &batches);
                assert_eq!(timeless(done.unwrap()), expected, "{name} {after}");
                assert_eq!(resumed, (after > 0).then_some(after), "{name} {after}");
                assert!(
                    output(&dense.out("out")) == output(&whole),
                    "{name} {after}"
                );
                assert_eq!(fs::read_dir(dense.root.path()).unwrap().count(), 4);
                fs::remove_dir_all(dense.out("out")).unwrap();
            }
            fs::remove_dir_all(&whole).unwrap();
        }
    }
}

/// A block whose adapters are damaged is done again, and what is not of a block is removed.
#[test]
fn damaged_adapters_of_a_block_are_made_again() {
    let (dense, batches) = (Dense::llama(3), batches());
    let (method, rtn) = (Loftq::new(lora()), rtn());
    let (whole, out) = (dense.out("whole"), dense.out("out"));
    let initializer = Initializer::new(&method, &rtn);
    initialize_to(
        &dense.dir,
        &whole,
        &initializer,
        &batches,
        &streaming(),
        |_| {},
    )
    .unwrap();
    for damaged in ["adapter_model.safetensors", "adapter_config.json"] {
        stop(&dense, &method, &rtn, &batches, 2);
        let partial = dense.out("out.partial");
        let adapters = partial.join("adapters");
        let mut blocks: Vec<_> = fs::read_dir(&adapters)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        blocks.sort_by_key(fs::DirEntry::file_name);
        assert_eq!(blocks.len(), 2);
        let path = blocks[1].path().join(damaged);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        // Of a process that was killed.
        fs::create_dir(adapters.join(".half.tensor-files.tmp")).unwrap();
        fs::create_dir(partial.join("files/adapter")).unwrap();
        let (done, resumed) = go_on(&dense, &method, &rtn, &batches);
        done.unwrap();
        assert_eq!(resumed, Some(1), "{damaged}");
        assert!(output(&out) == output(&whole), "{damaged}");
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn another_method_does_not_go_on() {
    let (dense, batches, rtn) = (Dense::llama(2), batches(), rtn());
    let method = Loftq::new(lora());
    stop(&dense, &method, &rtn, &batches, 1);
    let others: [(&dyn Method, [&str; 2]); 6] = [
        (
            &Loftq::new(lora()).with_rounds(2),
            ["rounds: 5", "rounds: 2"],
        ),
        (&Loftq::new(Lora::new(2)), ["rank: 3", "rank: 2"]),
        (
            &Loftq::new(lora().with_alpha(4.0)),
            ["Some(5.0)", "Some(4.0)"],
        ),
        (&Loftq::new(lora().with_seed(8)), ["seed: 7", "seed: 8"]),
        (
            &Loftq::new(lora().with_targets(["q_proj"])),
            ["targets: All", "q_proj"],
        ),
        (&Pissa::new(lora()), ["Loftq", "Pissa"]),
    ];
    for (other, expected) in others {
        let (done, _) = go_on(&dense, other, &rtn, &batches);
        let error = done.unwrap_err();
        assert!(
            matches!(&error, Error::Stream(StreamError::Differs { what, .. }) if what == "method"),
            "{error}"
        );
        for part in expected {
            assert!(error.to_string().contains(part), "no {part} in: {error}");
        }
    }
    // A run of the same recipe that attaches no adapters.
    let out = dense.out("out");
    let quantized = models::quantize_to(&dense.dir, &out, &rtn, &batches, &streaming(), |_| {});
    let error = quantized.unwrap_err();
    assert!(
        matches!(&error, Error::Stream(StreamError::Differs { what, .. }) if what == "method"),
        "{error}"
    );
    // Nothing that was refused cost a block.
    let (done, resumed) = go_on(&dense, &method, &rtn, &batches);
    assert_eq!((done.unwrap().len(), resumed), (14, Some(1)));
}

/// The error of a method behind those of the crates between.
fn of_method(error: &Error) -> Option<&loftq::Error> {
    match error {
        Error::Peft(peft::Error::Method(error)) => error.downcast_ref(),
        _ => None,
    }
}

/// Before a weight is read: the file has none.
#[test]
fn what_shapes_tell_is_refused_before_weights_are_read() {
    let (dense, batches) = (Dense::llama(2), batches());
    let refused = |method: &dyn Method, recipe: &dyn Recipe, batches: &[Batch]| {
        let (done, _) = go_on(&dense, method, recipe, batches);
        assert_eq!(fs::read_dir(dense.root.path()).unwrap().count(), 2);
        done.unwrap_err()
    };
    let rtn = rtn();
    for (method, name) in [
        (Box::new(Rilq::new(2)) as Box<dyn Method>, "RILQ"),
        (Box::new(Rilq::after(Loftq::new(2))), "RILQ"),
        (Box::new(LqLora::new(2).with_fisher(true)), "Fisher"),
    ] {
        let error = refused(&*method, &rtn, &batches);
        let whole = matches!(of_method(&error), Some(loftq::Error::WholeModel { .. }));
        assert!(whole && error.to_string().contains(name), "{error}");
    }
    let nf = NormalFloat::new().with_block_size(8);
    for method in [
        Box::new(Apiq::new(2)) as Box<dyn Method>,
        Box::new(ApiqBlock::new(2)),
        Box::new(BlockAp::new()),
    ] {
        let error = refused(&*method, &nf, &batches);
        let no_range = matches!(of_method(&error), Some(loftq::Error::NoRange { .. }));
        assert!(no_range, "{error}");
    }
    let few = Lora::new(2).with_targets(["q_proj"]);
    let error = refused(&ApiqBlock::new(few), &nf, &batches);
    assert!(
        matches!(of_method(&error), Some(loftq::Error::NoRange { .. })),
        "{error}"
    );
    for method in [
        Box::new(Qera::new(2)) as Box<dyn Method>,
        Box::new(Apiq::new(2)),
        Box::new(ApiqBlock::new(2)),
        Box::new(BlockAp::new()),
    ] {
        let error = refused(&*method, &rtn, &[]);
        assert!(
            matches!(error, Error::Peft(peft::Error::NoCalibration)),
            "{error}"
        );
    }
    let error = refused(&Loftq::new(33), &rtn, &[]);
    assert!(
        matches!(error, Error::Peft(peft::Error::Rank { rank: 33, .. })),
        "{error}"
    );
    for lora in [
        Lora::new(0),
        Lora::new(2).with_alpha(-1.0),
        Lora::new(2).with_dropout(1.0),
    ] {
        let error = refused(&Loftq::new(lora), &rtn, &[]);
        assert!(
            matches!(error, Error::Peft(peft::Error::Setting { .. })),
            "{error}"
        );
    }
    let error = refused(&Apiq::new(2).with_learning_rates(0.0, 1.0), &rtn, &batches);
    assert!(
        matches!(error, Error::Peft(peft::Error::Setting { .. })),
        "{error}"
    );
    let named = Loftq::new(Lora::new(2).with_targets(["q_proj", "qproj"]));
    let error = refused(&named, &rtn, &[]);
    assert!(
        matches!(error, Error::Peft(peft::Error::NoTarget { .. })),
        "{error}"
    );
    let error = refused(&Loftq::new(2), &PerLayer::default(), &[]);
    assert!(
        matches!(error, Error::Stream(StreamError::NothingToDo)),
        "{error}"
    );
}

/// A layer that is packed cannot get factors that undo its error; one that is no target stays as it is.
#[test]
fn packed_layers_are_no_targets() {
    let dense = Dense::llama(2);
    let mut lm = load(&dense.dir, &Device::flex()).unwrap();
    let mut only = PerLayer::default();
    let packed = "model.layers.0.mlp.down_proj";
    only.0.insert(packed.into(), rtn());
    models::quantize(&mut lm.model, &only, &[], |_| {}).unwrap();
    let mixed = Dense {
        dir: dense.out("mixed"),
        ..dense
    };
    models::save(&lm, &mixed.dir).unwrap();
    let rest = Rtn::new().with_group_size(8);
    let recipe = But(&rest, "0.mlp.down_proj");
    let (done, _) = go_on(&mixed, &Loftq::new(2), &recipe, &[]);
    let error = done.unwrap_err();
    assert!(
        matches!(&error, Error::Peft(peft::Error::AlreadyQuantized { path }) if path == packed),
        "{error}"
    );
    let targets = Lora::new(2).with_targets(["q_proj"]);
    let (done, _) = go_on(&mixed, &Loftq::new(targets), &recipe, &[]);
    assert_eq!(done.unwrap().len(), 13);
    let lm = load(mixed.out("out").join("base"), &Device::flex()).unwrap();
    let linears = peft::Linears::linears(&lm.model);
    assert!(
        linears
            .iter()
            .all(|(_, linear)| linear.weight().format().is_some())
    );
}
