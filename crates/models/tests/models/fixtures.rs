//! Models, tokenizers and files that several tests use.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use models::{Activation, Config, Model, Pretrained};
use peft::{CausalLm, Linears};
use proptest::prelude::*;
use quant_core::{DoubleQuant, Format, NormalFloat, Quantizer, Rtn};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

#[path = "../fixtures/architectures.rs"]
mod architectures;
#[path = "../fixtures/word_level.rs"]
mod word_level;

pub(crate) use architectures::{SMALL, Sizes, architectures, llama, opt};
pub(crate) use word_level::write_tokenizer;

/// A configuration of `n` cases, times `PROPTEST_CASES / 256` where that is set.
pub(crate) fn cases(n: u32) -> ProptestConfig {
    ProptestConfig::with_cases((ProptestConfig::default().cases * n / 256).max(1))
}

/// Models of every architecture; LLaMAs, Qwen2 among them, and OPTs of both styles with all their
/// switches.
pub(crate) fn configs() -> impl Strategy<Value = Config> {
    let n_kv = prop::sample::select(vec![1, 2, 4]);
    let llamas = (n_kv, any::<bool>(), any::<bool>(), any::<bool>());
    let llamas = llamas.prop_map(|(n_kv, bias, output_bias, tied)| {
        // Biases of queries, keys and values alone are those of Qwen2, whose MLP has none.
        let others = bias && output_bias;
        let config = llama()
            .with_num_key_value_heads(n_kv)
            .with_attention_bias(bias)
            .with_attention_output_bias(others)
            .with_mlp_bias(others)
            .with_tie_word_embeddings(tied);
        Config::Llama(config)
    });
    let width = prop::sample::select(vec![24, 16]);
    let activation = prop::sample::select(vec![
        Activation::Relu,
        Activation::Gelu,
        Activation::GeluTanh,
    ]);
    let opts = (width, activation, [any::<bool>(); 5]);
    let opts = opts.prop_map(
        |(width, activation, [before, remove, bias, affine, tied])| {
            let config = opt()
                .with_word_embed_proj_dim(width)
                .with_do_layer_norm_before(before)
                .with_remove_final_layer_norm(remove)
                .with_activation(activation)
                .with_enable_bias(bias)
                .with_layer_norm_elementwise_affine(affine)
                .with_tie_word_embeddings(tied);
            Config::Opt(config)
        },
    );
    prop_oneof![llamas, opts, prop::sample::select(architectures(SMALL))]
}

/// A directory with a tokenizer, and a model with it none of whose parameters is a round number.
pub(crate) fn pretrained(config: impl Into<Config>, seed: u64) -> (TempDir, Pretrained) {
    let config = config.into();
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = dir.path().join("tokenizer.json");
    write_tokenizer(&tokenizer, config.vocab_size());
    let model = Model::init(config, seed, &Device::flex()).map(&mut Unround);
    let lm = Pretrained::new(model, &tokenizer).unwrap();
    (dir, lm)
}

/// Moves every element by its own amount.
pub(crate) struct Unround;

impl ModuleMapper for Unround {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|values| {
            let shape = values.shape();
            let at = Tensor::<1, Int>::arange(0..shape.num_elements() as i64, &Device::flex());
            values + at.float().sin().reshape(shape) * 0.1
        })
    }
}

/// A text of 400 words, among the first 13.
pub(crate) fn text() -> String {
    (0..400).map(|i| format!("w{} ", i * i % 13)).collect()
}

/// Twelve tokens.
pub(crate) const PROBE: [i32; 12] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8];

/// `n` sequences of tokens.
pub(crate) fn tokens(ids: &[i32], n: usize) -> Tensor<2, Int> {
    Tensor::from_data(
        TensorData::new(ids.to_vec(), [n, ids.len() / n]),
        &Device::flex(),
    )
}

pub(crate) fn logits(model: &Model, ids: &[i32], n: usize) -> Vec<f32> {
    values(model.forward(tokens(ids, n)))
}

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

pub(crate) fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

/// Quantizers with zeros, without, and with scales as codes.
pub(crate) fn head_quantizer(at: usize) -> Box<dyn Quantizer> {
    let double = DoubleQuant::dynamic();
    match at {
        0 => Box::new(Rtn::new().with_group_size(8)),
        1 => Box::new(Rtn::new().with_bits(3).with_symmetric(true)),
        _ => Box::new(
            NormalFloat::new()
                .with_block_size(8)
                .with_double_quant(double),
        ),
    }
}

pub(crate) fn head_format(model: &Model) -> Option<Format> {
    let weights = model.other_weights();
    let head = weights.iter().find(|(path, _)| path == "lm_head");
    head.and_then(|(_, head)| head.format())
}

#[track_caller]
pub(crate) fn assert_says(message: impl ToString, parts: &[&str]) {
    let message = message.to_string();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

/// A directory of this crate.
pub(crate) fn golden(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden").join(name)
}

/// A directory beside the project.
pub(crate) fn shared(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("../../../shared/golden").join(name)
}

/// The `input_ids` of a file of references.
pub(crate) fn reference_tokens(reference: &Path) -> Tensor<2, Int> {
    let bytes = fs::read(reference).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let (chunks, _) = ids.data().as_chunks::<8>();
    let ids_of = chunks.iter().map(|&id| i64::from_le_bytes(id) as i32);
    let values: Vec<i32> = ids_of.collect();
    let shape = [ids.shape()[0], ids.shape()[1]];
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// The type, shape and bytes of each tensor of a file.
pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub(crate) fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let all = file.tensors().into_iter();
    all.map(|(name, t)| (name, (t.dtype(), t.shape().into(), t.data().into())))
        .collect()
}

pub(crate) fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (name, view)
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}
