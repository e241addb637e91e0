//! Logits, losses, gradients and continuations against transformers, in both spellings of its
//! configuration, with padding on either side.
//!
//! The references of `llama_bf16` were made by a model that had been cast to bf16 whole, its
//! rotary frequencies too, which a model that transformers loads is not. The file has the
//! frequencies that were used; the comparison is with those.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use half::bf16;
use peft::{Batch, Blocks, CausalLm, nll_of_output};
use safetensors::SafeTensors;
use tensor_files::TensorFile;

use super::Model;
use crate::positions::Positions;
use crate::rope::Rope;
use crate::{Config, Generation, generate, load};

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
    names.map(|name| root.join(name)).into()
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
fn integers(reference: &Path, name: &str) -> (Vec<i64>, [usize; 2]) {
    let bytes = std::fs::read(reference).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor(name).unwrap();
    let (chunks, _) = ids.data().as_chunks::<8>();
    let values = chunks.iter().map(|&id| i64::from_le_bytes(id));
    (values.collect(), [ids.shape()[0], ids.shape()[1]])
}

fn tokens(reference: &Path) -> Tensor<2, Int> {
    let (ids, dims) = integers(reference, "input_ids");
    Tensor::from_data(TensorData::new(ids, dims), &Device::flex())
}

fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

fn values<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().try_into_vec().unwrap()
}

/// Makes all parameters trainable, in `F32`.
struct Unfreeze;

impl ModuleMapper for Unfreeze {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param
            .map(|values| values.cast(DType::F32))
            .set_require_grad(true)
    }
}

/// The output of the last block.
fn output(model: &Model, tokens: Tensor<2, Int>, positions: &Positions) -> Tensor<3> {
    let x = model.embed(tokens, positions);
    (0..model.n_blocks()).fold(x, |x, block| model.block(block, x, positions))
}

fn logits(model: &Model, tokens: Tensor<2, Int>, positions: &Positions) -> Vec<f32> {
    let x = model.norm(output(model, tokens, positions));
    let [batch, seq, width] = x.dims();
    values(model.head().logits(x.reshape([batch * seq, width])))
}

/// The positions of a batch, for a LLaMA with the frequencies of the file.
fn positions(model: &Model, batch: &Batch, reference: &mut TensorFile) -> Positions {
    let own = model.positions(batch.spans());
    let Config::Llama(config) = model.config() else {
        return own;
    };
    let seq = batch.tokens().dims()[1];
    let (used, _) = reference.floats::<1>("inv_freq").unwrap();
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
        Positions::rotary(rope.of_spans(batch.spans()), batch.spans())
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
            check_gradients(&model, &loss, dir, &mut reference);
        }
    }
}

fn check_gradients(model: &Model, loss: &Tensor<1>, dir: &Path, reference: &mut TensorFile) {
    let mut visitor = Gradients {
        gradients: loss.backward(),
        path: vec![model.config().prefix().into()],
        found: BTreeMap::new(),
    };
    model.visit(&mut visitor);
    let names = reference.names();
    let expected = names.iter().filter_map(|name| name.strip_prefix("grad."));
    let mut checked = 0;
    for name in expected {
        let found = &visitor.found[name];
        let name = format!("grad.{name}");
        let expected = match reference.floats::<2>(&name) {
            Ok((values, _)) => values,
            Err(_) => reference.floats::<1>(&name).unwrap().0,
        };
        let scale = expected.iter().fold(0.0f32, |max, g| max.max(g.abs()));
        let off = if name.ends_with("k_proj.bias") {
            // A bias of the keys changes all scores of a query alike, and so no probability: the
            // gradient is 0 up to rounding.
            assert!(scale < 1e-6 && found.iter().all(|g| g.abs() < 1e-6));
            0.0
        } else {
            largest_difference(found, &expected) / scale
        };
        assert!(off <= 1e-3, "{}: {name} differs by {off}", dir.display());
        checked += 1;
    }
    // The parameters of the first block, and what is beside the blocks.
    let expected = match model.config() {
        Config::Llama(_) => 10,
        Config::Opt(_) => 17 + 2 * usize::from(model.project_in.is_some()),
    };
    assert_eq!(checked, expected, "{}", dir.display());
}

/// Gradients by the names of Hugging Face's files, as they lie there.
struct Gradients {
    gradients: burn::tensor::Gradients,
    path: Vec<String>,
    found: BTreeMap<String, Vec<f32>>,
}

impl ModuleVisitor for Gradients {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param.val().grad(&self.gradients).unwrap();
        let is_opt = self.path[0] == "model.decoder";
        let path: Vec<&str> = (self.path.iter())
            .map(String::as_str)
            .filter(|name| !["Dense", "Llama", "Opt", "Rms", "Layer"].contains(name))
            .map(|name| match name {
                "o_proj" if is_opt => "out_proj",
                "norm" if is_opt => "final_layer_norm",
                name => name,
            })
            .collect();
        let mut name = path.join(".");
        let is_table = path.last().is_some_and(|name| name.starts_with("embed_"));
        let is_other = path.last().is_some_and(|name| name.starts_with("project_"));
        if is_table || is_other {
            name.push_str(".weight");
        }
        let gradient = if D == 2 && !is_table {
            gradient.swap_dims(0, 1)
        } else {
            gradient
        };
        self.found.insert(name, values(gradient));
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
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
        if !reference.contains("left_logits") || dir.ends_with("llama_bf16") {
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
    assert!(n >= 4);
}
