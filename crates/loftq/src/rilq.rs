//! RILQ (Lee et al. 2025, arXiv:2412.01129): all adapters together, against the dense model.
//!
//! At 2 bits the error of a weight is of high rank, and adapters tuned layer by layer lower it little;
//! tuned together they compensate for each other's errors. The loss is half the mean squared error of the
//! last hidden state, here in units of the dense model's mean square, and half the cross-entropy of the
//! next token, on calibration text.

use burn::tensor::{DType, Tensor};
use peft::{
    Adapters, Batch, CausalLm, Evaluation, FitConfig, LayerError, LayerShape, Lora, Recipe,
    Schedule, Stages, Streams, check_recipe, fit_with, last_output, nll_of_output,
};
use quant_core::Needs;

use crate::{Error, Initialization, InitializedLayer, Layer, LayerMethod, Result};

const WHOLE_MODEL: Error = Error::WholeModel { method: "RILQ" };

/// Tunes the adapters of another method together, against the last hidden state of the dense model.
///
/// Only the adapters are tuned. The dense model stays in memory, for its hidden states and the report;
/// an error leaves the model unchanged. The seconds of a layer are those of the first method.
#[derive(Clone, Debug)]
pub struct Rilq<L = Lora> {
    first: L,
    fit: FitConfig,
    cross_entropy: f32,
}

impl Rilq {
    /// RILQ from adapters that add nothing, of this rank or with these settings.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self::after(lora.into())
    }
}

impl<L: LayerMethod> Rilq<L> {
    /// RILQ from the adapters of another method: 100 steps at a learning rate of 10⁻⁴ without decay, as
    /// published but for the number of steps, which there depends on held-out text.
    pub fn after(first: L) -> Self {
        let fit = FitConfig::new()
            .with_learning_rate(1e-4)
            .with_steps(100)
            .with_schedule(Schedule::Constant)
            .with_seed(first.lora().seed());
        Self {
            first,
            fit,
            cross_entropy: 0.5,
        }
    }

    /// The share of the cross-entropy in the loss, from 0 to 1; the rest is that of the hidden state.
    /// One half, as published.
    pub fn with_cross_entropy(mut self, share: f32) -> Self {
        self.cross_entropy = share;
        self
    }

    /// The settings of the tuning. An [`Evaluation`] measures the same loss on its held-out batches; the paper
    /// ends by it, after every 25 steps with a patience of 5.
    pub fn with_fit(mut self, fit: FitConfig) -> Self {
        self.fit = fit;
        self
    }
}

impl<M: Stages, L: LayerMethod> Initialization<M> for Rilq<L> {
    fn check_parts(&self, _: &[LayerShape], _: &dyn Recipe) -> Result<Needs> {
        Err(WHOLE_MODEL)
    }

    fn run_part(
        &self,
        _: &mut M,
        _: &dyn Recipe,
        _: &mut Streams<'_>,
        _: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>> {
        Err(WHOLE_MODEL)
    }

    fn run(
        &self,
        model: &mut M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>>
    where
        M: CausalLm,
    {
        self.fit.check()?;
        if !(0.0..=1.0).contains(&self.cross_entropy) {
            let value = self.cross_entropy.to_string();
            return Err(peft::Error::Setting {
                setting: "cross_entropy",
                value,
                expected: "from 0 to 1",
            }
            .into());
        }
        if calibration.is_empty() {
            return Err(peft::Error::NoCalibration.into());
        }
        let held_out = self.fit.evaluation().map_or(&[][..], Evaluation::batches);
        // The held-out batches are counted on after those of the training.
        let batches: Vec<&Batch> = calibration.iter().chain(held_out).collect();
        for batch in &batches {
            batch.check(model)?;
        }
        let teacher = model.clone();
        let hidden = |batch: &&Batch| teacher.norm(last_output(&teacher, batch));
        let targets: Vec<Tensor<3>> = batches.iter().map(hidden).collect();
        let mut student = model.clone();
        let mut layers = self
            .first
            .run(&mut student, recipe, calibration, &mut |_| {})?;
        // In units of the mean square of a hidden state, which differs from model to model.
        let scale: f32 = (targets.iter())
            .zip(calibration)
            .map(|(target, batch)| batch.of_text(target.clone()))
            .map(|target| target.cast(DType::F32).square().mean().into_scalar::<f32>())
            .sum::<f32>()
            / calibration.len() as f32;
        let loss = |model: &M, x: Tensor<3>, at: usize| {
            let [n, seq, hidden] = x.dims();
            let predicting = |x: Tensor<3>| x.slice([0..n, 0..seq - 1, 0..hidden]);
            let wide = |x: Tensor<3>| x.cast(DType::F32);
            let difference = wide(model.norm(predicting(x.clone())));
            let difference = difference - wide(predicting(targets[at].clone()));
            let square = difference.square().mean_dim(2).squeeze_dim::<2>(2) / scale;
            let (share, batch) = (self.cross_entropy, batches[at]);
            let of_tokens = if share == 0.0 {
                square
            } else {
                square * (1.0 - share) + nll_of_output(model, x, batch) * share
            };
            batch.of_targets(of_tokens).sum()
        };
        // Only the adapters are trained here, even of a model whose other parameters train.
        let mut tuned = student.clone();
        peft::freeze_base(&mut tuned);
        fit_with(&mut tuned, calibration, &self.fit, loss, |_, _| {})?;
        peft::activate(&mut student, &Adapters::of(&tuned)?)?;

        // On the inputs that come through the tuned layers.
        let needs = check_recipe(&teacher, recipe, calibration)?;
        let mut walked = teacher.clone();
        let tuned = student.linears();
        let mut streams = Streams::start(&walked, calibration, needs);
        while let Some(stage) = streams.next_stage(&walked) {
            for at in stage.layers {
                let (path, linear) = walked.linears_mut().swap_remove(at);
                let dense = Layer::of(&path, linear, stage.gram.as_ref());
                *linear = tuned[at].1.clone();
                let Some(layer) = layers.iter_mut().find(|layer| layer.report.path == path) else {
                    continue;
                };
                let plain = match recipe.quantizer(&path) {
                    Some(quantizer) => dense.quantize(dense.weight.clone(), quantizer)?.1,
                    None => dense.weight.clone(),
                };
                let between = |found| LayerError::between(dense.weight.clone(), found, dense.gram);
                layer.before = between(plain);
                layer.report.error = between(linear.to_dense());
                on_layer(layer);
            }
        }
        *model = student;
        Ok(layers)
    }
}
