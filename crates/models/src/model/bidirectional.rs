//! A block whose tokens attend to those before and after them, as in an encoder, against transformers.

use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use peft::{Batch, Blocks, Linears, Lora, Method, Peqa, attach, merge};
use quant_core::Rtn;
use tensor_files::TensorFile;

use super::Model;
use super::golden::{
    Unfreeze, check_gradients, integers, largest_difference, output, tokens, values,
};
use crate::kv_cache::KvCache;
use crate::positions::{Positions, Reach};
use crate::{Config, load, quantize};

/// The names of the masks, with the windows of some.
const MASKS: [(&str, Option<usize>); 6] = [
    ("whole", None),
    ("left", None),
    ("right", None),
    ("documents", None),
    ("window", Some(3)),
    ("window_of_documents", Some(3)),
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bidirectional")
}

fn reference() -> PathBuf {
    directory().join("reference.safetensors")
}

fn model() -> Model {
    load(directory(), &Device::flex()).unwrap().model
}

/// The texts, padded or cut into documents as the mask says.
fn batch(mask: &str) -> Batch {
    let batch = Batch::new(tokens(&reference())).unwrap();
    let (starts, [_, seq]) = integers(&reference(), &format!("{mask}.starts"));
    let starts: Vec<usize> = starts.iter().map(|&start| start as usize).collect();
    match mask {
        "whole" => batch,
        "left" | "right" => {
            // Each token of padding is a document of its own.
            let is_text = starts.chunks(seq).flat_map(|row| {
                let len = |start| row.iter().filter(|&&other| other == start).count();
                row.iter().map(move |&start| len(start) > 1)
            });
            let is_text: Vec<bool> = is_text.collect();
            batch.with_padding(&is_text).unwrap()
        }
        _ => batch.with_starts(&starts).unwrap(),
    }
}

/// The positions of a batch, as an encoder with the block's rotation would have them.
fn positions(model: &Model, window: Option<usize>, batch: &Batch) -> Positions {
    let Config::Llama(config) = model.config() else {
        panic!("a Llama");
    };
    let reach = Reach {
        causal: false,
        window,
        rotary: Some(config.rotary()),
    };
    Positions::new(&[reach], None, batch.spans())
}

#[test]
fn outputs_and_gradients_are_transformers() {
    let mut reference = TensorFile::open(&reference()).unwrap();
    let model = model().map(&mut Unfreeze).train();
    let (weights, dims) = reference.floats::<3>("weights").unwrap();
    let weights = Tensor::<3>::from_data(TensorData::new(weights, dims), &Device::flex());
    for (mask, window) in MASKS {
        let batch = batch(mask);
        let positions = positions(&model, window, &batch);
        let x = peft::CausalLm::norm(&model, output(&model, batch.tokens(), &positions));
        let (expected, _) = reference.floats::<3>(&format!("{mask}.output")).unwrap();
        let scale = expected.iter().fold(0.0f32, |most, y| most.max(y.abs()));
        let off = largest_difference(&values(x.clone().inner()), &expected);
        assert!(off <= 1e-5 * scale, "{mask}: {off} of {scale}");
        let loss = (x * weights.clone().autodiff()).sum();
        check_gradients(&model, &loss, &format!("{mask}.grad."), &mut reference);
    }
}

/// A token changes the outputs of its document, before it too, and no other: not those of other texts.
#[test]
fn tokens_change_outputs_of_their_document() {
    let model = model();
    let batch = batch("documents");
    let outputs = |text: &Batch| {
        let positions = positions(&model, None, text);
        values(output(&model, text.tokens(), &positions))
    };
    let before = outputs(&batch);
    let at = 8;
    let changed = (batch.tokens().slice([0..1, at..at + 1]) + 1).remainder_scalar(48);
    let changed = batch.tokens().slice_assign([0..1, at..at + 1], changed);
    let (starts, _) = integers(&reference(), "documents.starts");
    let starts: Vec<usize> = starts.iter().map(|&start| start as usize).collect();
    let after = outputs(&Batch::new(changed).unwrap().with_starts(&starts).unwrap());
    let width = before.len() / starts.len();
    let rows = before.chunks(width).zip(after.chunks(width));
    for (token, (before, after)) in rows.enumerate() {
        let is_of_document = token < 12 && starts[token] == starts[at];
        assert_eq!(before != after, is_of_document, "{token}");
    }
}

/// Adds a wave to each trained parameter.
struct Nudge;

impl ModuleMapper for Nudge {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        param.map(|values| {
            let dims = values.dims();
            let n = dims.iter().product::<usize>();
            let wave = (0..n).map(|i| 0.02 * (0.7 * i as f32).sin()).collect();
            let wave = Tensor::from_data(TensorData::new(wave, dims), &values.device());
            (values.detach() + wave).detach().require_grad()
        })
    }
}

/// Counts the parameters whose gradients are not 0.
struct Moved {
    gradients: Gradients,
    n: usize,
}

impl ModuleVisitor for Moved {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(&self.gradients) {
            self.n += usize::from(gradient.abs().max().into_scalar::<f32>() > 0.0);
        }
    }
}

/// Adapters change nothing before they train, get gradients, and are merged.
#[test]
fn adapters_attach_and_merge() {
    let batch = batch("left");
    for (method, packed) in [(&Lora::new(2) as &dyn Method, false), (&Peqa::new(), true)] {
        let mut model = model();
        if packed {
            let rtn = Rtn::new().with_group_size(8);
            quantize(&mut model, &rtn, &[], |_| {}).unwrap();
        }
        let positions = positions(&model, None, &batch);
        let outputs = |model: &Model| values(output(model, batch.tokens(), &positions));
        let base = outputs(&model);
        attach(&mut model, method).unwrap();
        assert_eq!(outputs(&model), base);
        let training = model.train().map(&mut Nudge);
        let loss = output(&training, batch.tokens(), &positions).sum();
        let mut moved = Moved {
            gradients: loss.backward(),
            n: 0,
        };
        training.visit(&mut moved);
        // Two factors, or the scales, of each projection.
        let of_each = if packed { 1 } else { 2 };
        assert_eq!(moved.n, of_each * training.linears().len());

        let mut model = training.valid();
        let tuned = outputs(&model);
        assert!(largest_difference(&tuned, &base) > 1e-3);
        merge(&mut model).unwrap();
        let mut linears = model.linears().into_iter();
        assert!(linears.all(|(_, linear)| linear.adapter().is_none()));
        let scale = largest_difference(&tuned, &vec![0.0; tuned.len()]);
        let off = largest_difference(&outputs(&model), &tuned);
        assert!(off < 1e-5 * scale, "{off} of {scale}");
    }
}

#[test]
#[should_panic(expected = "a KV cache, but tokens attend to later ones")]
fn a_cache_is_causal() {
    let model = model();
    let batch = batch("whole");
    let positions = positions(&model, None, &batch);
    let x = model.embed(batch.tokens(), &positions);
    model.layers[0].forward(x, &positions, Some(&mut KvCache::default()));
}
