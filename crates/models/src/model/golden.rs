//! Logits, losses, gradients and continuations against transformers, of every architecture, in both
//! spellings of its configuration, with padding on either side.
//!
//! The references of `llama_bf16` were made by a model that had been cast to bf16 whole, its
//! rotary frequencies too, which a model that transformers loads is not. The file has the
//! frequencies that were used; the comparison is with those.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use half::bf16;
use peft::{Batch, Blocks, CausalLm, Linears, Weight, nll_of_output};
use safetensors::SafeTensors;
use tensor_files::TensorFile;

use super::{Model, Table};
use crate::positions::Positions;
use crate::rope::Rope;
use crate::source::{Vector, weight_name};
use crate::{Config, Generation, generate, load};

/// Directories of this crate, with what each has that public models have.
const DECODERS: [(&str, &str); 20] = [
    ("llama3", "Llama 3.2: frequencies of llama3, a tied head"),
    (
        "llama_gelu",
        "Llama-like models with biases and another function",
    ),
    (
        "mistral_window",
        "Mistral 7B v0.1: texts longer than the window",
    ),
    ("mistral_long_window", "Mistral 7B v0.1: shorter texts"),
    ("qwen2_windows", "Qwen2 and Qwen2.5 with use_sliding_window"),
    ("smollm3", "SmolLM3 3B: layers without rotation"),
    ("smollm3_windows", "SmolLM3 with its window and biases"),
    (
        "qwen3",
        "Qwen3 0.6B to 4B: norms of queries and keys, a tied head",
    ),
    ("qwen3_windows", "Qwen3 with layer_types and biases"),
    ("gemma2", "Gemma 2: soft caps, windows in every other layer"),
    (
        "gemma2_bias",
        "Gemma 2 without caps, with biases and a head of its own",
    ),
    ("gemma3", "Gemma 3 270M and 1B: rotations by layer"),
    (
        "gemma3_scaled",
        "Gemma 3 4B's text: scaled rotations of layers without a window",
    ),
    ("phi3", "Phi-3 mini 4k: fused projections, a window"),
    (
        "phi3_long",
        "Phi-4-mini: a part of each head is rotated; short factors",
    ),
    ("phi3_longer", "Phi-3 mini 128k: long factors"),
    ("gpt_neo", "GPT-Neo: local layers"),
    ("gptj", "GPT-J: a part of each head is rotated"),
    ("gptj_whole", "GPT-J-like models that rotate whole heads"),
    (
        "olmo2",
        "OLMo 2: norms behind attention and MLP, and of all queries",
    ),
];

/// The directories of this crate.
fn own() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let names = [
        "llama_gqa",
        "llama_bf16",
        "llama_mha_tied",
        "opt_125m_style",
        "opt_350m_style",
    ];
    let decoders = DECODERS.map(|(name, _)| root.join("decoders").join(name));
    names
        .into_iter()
        .map(|name| root.join(name))
        .chain(decoders)
        .collect()
}

/// The directories beside the project.
fn shared() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    let names = [
        "llama_gqa",
        "llama_mha_tied",
        "llama_rope_llama3",
        "llama_sharded",
        "llama_bf16",
        "opt_125m_style",
        "opt_350m_style",
    ];
    names.map(|name| root.join(name)).into()
}

/// A tensor of 64-bit integers with two dimensions.
pub(super) fn integers(reference: &Path, name: &str) -> (Vec<i64>, [usize; 2]) {
    let bytes = std::fs::read(reference).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor(name).unwrap();
    let (chunks, _) = ids.data().as_chunks::<8>();
    let values = chunks.iter().map(|&id| i64::from_le_bytes(id));
    (values.collect(), [ids.shape()[0], ids.shape()[1]])
}

pub(super) fn tokens(reference: &Path) -> Tensor<2, Int> {
    let (ids, dims) = integers(reference, "input_ids");
    Tensor::from_data(TensorData::new(ids, dims), &Device::flex())
}

pub(super) fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

pub(super) fn values<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().try_into_vec().unwrap()
}

/// Makes all parameters trainable, in `F32`.
pub(super) struct Unfreeze;

impl ModuleMapper for Unfreeze {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param
            .map(|values| values.cast(DType::F32))
            .set_require_grad(true)
    }
}

/// The output of the last block.
pub(super) fn output(model: &Model, tokens: Tensor<2, Int>, positions: &Positions) -> Tensor<3> {
    let x = model.embed(tokens, positions);
    (0..model.n_blocks()).fold(x, |x, block| model.block(block, x, positions))
}

fn logits(model: &Model, tokens: Tensor<2, Int>, positions: &Positions) -> Vec<f32> {
    let x = model.norm(output(model, tokens, positions));
    let [batch, seq, width] = x.dims();
    values(model.head().logits(x.reshape([batch * seq, width])))
}

/// The positions of a batch, with the frequencies of the file if it has some.
fn positions(model: &Model, batch: &Batch, reference: &mut TensorFile) -> Positions {
    let own = model.positions(batch.spans());
    let (Config::Llama(config), Ok((used, _))) =
        (model.config(), reference.floats::<1>("inv_freq"))
    else {
        return own;
    };
    let seq = batch.tokens().dims()[1];
    let is_cast = used.iter().all(|&f| bf16::from_f32(f).to_f32() == f);
    for (own, used) in config.rotary().frequencies(seq).iter().zip(&used) {
        let own = if is_cast {
            bf16::from_f32(*own).to_f32()
        } else {
            *own
        };
        assert!((own / used - 1.0).abs() < 1e-6, "{own} for {used}");
    }
    if is_cast {
        let rope = Rope::of(&used, 1.0, seq, &Device::flex());
        own.with_rope(rope.of_spans(batch.spans()))
    } else {
        own
    }
}

#[test]
fn logits_losses_and_gradients_are_transformers() {
    check_logits_losses_and_gradients(&own());
}

/// All checks on the directories beside the project.
#[test]
#[ignore = "needs ../shared"]
fn shared_models_are_transformers() {
    check_logits_losses_and_gradients(&shared());
    check_padded_texts(&shared());
    check_continuations(&shared());
}

fn check_logits_losses_and_gradients(directories: &[PathBuf]) {
    let device = Device::flex();
    for dir in directories {
        for spelling in ["config.json", "config_legacy.json"] {
            if !dir.join(spelling).exists() {
                continue;
            }
            let copy = tempfile::tempdir().unwrap();
            for entry in std::fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
            }
            std::fs::copy(dir.join(spelling), copy.path().join("config.json")).unwrap();
            let reference_path = dir.join("reference.safetensors");
            let mut reference = TensorFile::open(&reference_path).unwrap();
            let batch = Batch::new(tokens(&reference_path)).unwrap();

            let model = load(copy.path(), &device).unwrap().model;
            let positions = positions(&model, &batch, &mut reference);
            let (expected, _) = reference.floats::<3>("logits").unwrap();
            let found = logits(&model, batch.tokens(), &positions);
            let off = largest_difference(&found, &expected);
            assert!(off <= 1e-4, "{}: logits differ by {off}", dir.display());

            let model = model.map(&mut Unfreeze).train();
            let x = output(&model, batch.tokens(), &positions);
            let loss = nll_of_output(&model, x, &batch).mean();
            let (expected, []) = reference.floats::<0>("loss").unwrap();
            let found = loss.clone().inner().into_scalar::<f32>();
            assert!((found - expected[0]).abs() <= 1e-5 * expected[0]);
            check_gradients(&model, &loss, "grad.", &mut reference);
        }
    }
}

/// Compares the gradients of the parameters that have one in the file, under `prefix`, and those of the first
/// block at least.
pub(super) fn check_gradients(
    model: &Model,
    loss: &Tensor<1>,
    prefix: &str,
    reference: &mut TensorFile,
) {
    let gradients = loss.backward();
    let found = gradients_by_name(model, &gradients);
    let names = reference.names();
    let names = names.iter().filter(|name| name.starts_with(prefix));
    let mut checked = 0;
    for name in names {
        let found = &found[&name[prefix.len()..]];
        let expected = match reference.floats::<2>(name) {
            Ok((values, _)) => values,
            Err(_) => reference.floats::<1>(name).unwrap().0,
        };
        let scale = expected.iter().fold(0.0f32, |max, g| max.max(g.abs()));
        let off = if name.ends_with("k_proj.bias") && scale < 1e-6 {
            // A bias of the keys changes all scores of a query alike where they are not rotated, and so no
            // probability: the gradient is 0 up to rounding.
            assert!(found.iter().all(|g| g.abs() < 1e-6));
            0.0
        } else {
            largest_difference(found, &expected) / scale
        };
        assert!(off <= 1e-3, "{name} differs by {off}");
        checked += 1;
    }
    let of_block = model.layers[0].linears().len() + model.layers[0].norms().len();
    assert!(checked >= of_block, "{checked} gradients under {prefix}");
}

/// Gradients by the names of Hugging Face's files, as they lie there.
fn gradients_by_name(
    model: &Model,
    gradients: &burn::tensor::Gradients,
) -> BTreeMap<String, Vec<f32>> {
    fn of<const D: usize>(
        param: &Param<Tensor<D>>,
        gradients: &burn::tensor::Gradients,
    ) -> Tensor<D> {
        param.val().grad(gradients).unwrap()
    }
    let mut found = BTreeMap::new();
    let linears = model.linears();
    let weights = linears.iter().map(|(path, linear)| (path, linear.weight()));
    let others = model.other_weights();
    let others = others.iter().map(|(path, weight)| (path, *weight));
    for (path, weight) in weights.chain(others) {
        let Weight::Dense(weight) = weight else {
            panic!("{path} is packed");
        };
        let gradient = of(weight, gradients).swap_dims(0, 1);
        found.insert(weight_name(path), values(gradient));
    }
    for (path, linear) in &linears {
        if let Some(bias) = linear.bias() {
            let gradient = bias.grad(gradients).unwrap();
            found.insert(Vector::Bias.name(path), values(gradient));
        }
    }
    for (name, table) in model.tables() {
        let gradient = match table {
            Table::Vector(vector) => values(of(vector, gradients)),
            Table::Matrix(table) => values(of(table, gradients)),
        };
        found.insert(name, gradient);
    }
    found
}

#[test]
fn logits_of_padded_texts_are_transformers() {
    check_padded_texts(&own());
}

/// Padding before or after a text changes none of its logits.
fn check_padded_texts(directories: &[PathBuf]) {
    for dir in directories {
        let reference_path = dir.join("reference.safetensors");
        let mut reference = TensorFile::open(&reference_path).unwrap();
        let model = load(dir, &Device::flex()).unwrap().model;
        for side in ["left", "right"] {
            let (mask, _) = integers(&reference_path, &format!("{side}_mask"));
            let is_text: Vec<bool> = mask.iter().map(|&mark| mark == 1).collect();
            assert!(is_text.contains(&false));
            let batch = Batch::new(tokens(&reference_path)).unwrap();
            let batch = batch.with_padding(&is_text).unwrap();
            let positions = positions(&model, &batch, &mut reference);
            let found = logits(&model, batch.tokens(), &positions);
            let name = format!("{side}_logits");
            let (expected, [_, _, vocab]) = reference.floats::<3>(&name).unwrap();
            assert_eq!(found.len(), expected.len());
            let rows = found.chunks(vocab).zip(expected.chunks(vocab));
            for ((found, expected), _) in rows.zip(&is_text).filter(|(_, is_text)| **is_text) {
                let off = largest_difference(found, expected);
                assert!(off <= 1e-4, "{}, {side}: {off}", dir.display());
            }
        }
    }
}

#[test]
fn greedy_continuations_are_transformers() {
    check_continuations(&own());
}

fn check_continuations(directories: &[PathBuf]) {
    let mut n = 0;
    for dir in directories {
        let reference_path = dir.join("reference.safetensors");
        let reference = TensorFile::open(&reference_path).unwrap();
        // That of a model cast whole has other frequencies.
        if !reference.contains("greedy") || dir.ends_with("llama_bf16") {
            continue;
        }
        let model = load(dir, &Device::flex()).unwrap().model;
        let (expected, [1, len]) = integers(&reference_path, "greedy") else {
            panic!("one text");
        };
        let expected: Vec<u32> = expected.iter().map(|&id| id as u32).collect();
        let settings = Generation::new(len - 8);
        let go_on = |_| ControlFlow::Continue(());
        let found = generate(&model, &expected[..8], &settings, go_on).unwrap();
        assert_eq!(found, expected[8..], "{}", dir.display());
        n += 1;
    }
    assert!(n >= 4, "{n} continuations");
}
