//! Logits, losses and gradients against transformers, in both spellings of its configuration.
//!
//! The references of `llama_bf16` were made by a model that had been cast to bf16 whole, its
//! rotary frequencies too, which a model that transformers loads is not. The file has the
//! frequencies that were used; the comparison is with those.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use half::bf16;
use peft::files::TensorFile;
use peft::{Batch, CausalLm, Linear, Linears, token_nll};
use safetensors::SafeTensors;

use super::Llama;
use crate::load;
use crate::rope::{Rope, frequencies};

const SHARED: [&str; 5] = [
    "llama_gqa",
    "llama_mha_tied",
    "llama_rope_llama3",
    "llama_sharded",
    "llama_bf16",
];

/// The project's own directories and, where they are beside it, all of them.
fn directories() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = ["llama_gqa", "llama_bf16", "llama_mha_tied"]
        .map(|name| root.join("tests/golden").join(name))
        .to_vec();
    let shared = root.join("../../../shared/golden");
    if shared.exists() {
        all.extend(SHARED.iter().map(|name| shared.join(name)));
    } else {
        eprintln!("skipped: no shared golden files beside the project");
    }
    all
}

fn tokens(reference: &Path) -> Tensor<2, Int> {
    let bytes = std::fs::read(reference).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let (chunks, _) = ids.data().as_chunks::<8>();
    let values: Vec<i32> = chunks
        .iter()
        .map(|&id| i64::from_le_bytes(id) as i32)
        .collect();
    let shape = [ids.shape()[0], ids.shape()[1]];
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
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

/// A LLaMA with given frequencies.
#[derive(Module, Debug)]
struct Turned {
    model: Llama,
    #[module(skip)]
    rope: Rope,
}

impl Linears for Turned {
    fn linears(&self) -> Vec<(String, &Linear)> {
        self.model.linears()
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        self.model.linears_mut()
    }
}

impl CausalLm for Turned {
    type Positions = Rope;

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn n_blocks(&self) -> usize {
        self.model.n_blocks()
    }

    fn positions(&self, _: usize, _: &Device) -> Rope {
        self.rope.clone()
    }

    fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.model.embed(tokens)
    }

    fn block(&self, index: usize, x: Tensor<3>, rope: &Rope) -> Tensor<3> {
        self.model.block(index, x, rope)
    }

    fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        self.model.norm(x)
    }

    fn head(&self) -> Tensor<2> {
        self.model.head()
    }
}

/// Makes all parameters trainable.
struct Unfreeze;

impl ModuleMapper for Unfreeze {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.set_require_grad(true)
    }
}

#[test]
fn logits_loss_and_gradients_are_transformers() {
    let device = Device::flex();
    for dir in directories() {
        for spelling in ["config.json", "config_legacy.json"] {
            let copy = tempfile::tempdir().unwrap();
            for entry in std::fs::read_dir(&dir).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
            }
            std::fs::copy(dir.join(spelling), copy.path().join("config.json")).unwrap();
            let reference_path = dir.join("reference.safetensors");
            let mut reference = TensorFile::open(&reference_path).unwrap();
            let tokens = tokens(&reference_path);

            let model = load(copy.path(), &device).unwrap().model;
            let [_, seq] = tokens.dims();
            let (used, _) = reference.floats::<1>("inv_freq").unwrap();
            let own = frequencies(model.config(), seq);
            let cast = used.iter().all(|&f| bf16::from_f32(f).to_f32() == f);
            for (own, used) in own.iter().zip(&used) {
                let own = if cast {
                    bf16::from_f32(*own).to_f32()
                } else {
                    *own
                };
                assert!((own / used - 1.0).abs() < 1e-6, "{own} for {used}");
            }
            let (logits, _) = reference.floats::<3>("logits").unwrap();
            let rope = Rope::of(&used, 1.0, seq, &device);
            let turned = Turned { model, rope };
            let found = values(turned.forward(tokens.clone()));
            if !cast {
                let found = values(turned.model.forward(tokens.clone()));
                assert!(largest_difference(&found, &logits) <= 1e-4);
            }
            let off = largest_difference(&found, &logits);
            assert!(off <= 1e-4, "{}: logits differ by {off}", dir.display());

            let Turned { model, rope } = turned;
            let model = model.map(&mut Unfreeze).train();
            let turned = Turned { model, rope };
            let batch = Batch::new(tokens).unwrap();
            let loss = token_nll(&turned, &batch).mean();
            let Turned { model, .. } = turned;
            let (expected, []) = reference.floats::<0>("loss").unwrap();
            let found = loss.clone().inner().into_scalar::<f32>();
            assert!((found - expected[0]).abs() <= 1e-5 * expected[0]);

            let mut visitor = Gradients {
                gradients: loss.backward(),
                path: vec!["model".into()],
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
                let off = largest_difference(found, &expected) / scale;
                assert!(off <= 1e-3, "{}: {name} differs by {off}", dir.display());
                checked += 1;
            }
            assert_eq!(
                checked, 10,
                "the parameters of the first block, and the last norm"
            );
        }
    }
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
        let gradient = match D {
            2 => gradient.swap_dims(0, 1),
            _ => gradient,
        };
        let path = self.path.iter().filter(|name| *name != "Dense");
        let path: Vec<&str> = path.map(String::as_str).collect();
        self.found.insert(path.join("."), values(gradient));
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}
