use burn::tensor::Tensor;
use peft::{Linear, Lora, Weight};
use quant_core::{Format, Needs, Quantizer};

use super::learned::Learned;
use super::learning::{Learning, settings};
use crate::blocks::unless_zero;
use crate::fake_quant::check_range;
use crate::{Error, Layer, LayerMethod, Result, Start};

/// Learns range and adapter of one layer after the other: ApiQ-lw.
#[derive(Clone, Debug)]
pub struct Apiq(pub(super) Learning);

impl Apiq {
    /// ApiQ of this rank, or with these adapters; 200 steps for each layer.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self(Learning::new(lora.into(), 200))
    }

    settings!("Steps for each layer, over all of the calibration.");
}

impl LayerMethod for Apiq {
    fn lora(&self) -> &Lora {
        &self.0.lora
    }

    fn needs(&self) -> Needs {
        Needs::Drift
    }

    fn check(&self, path: &str, format: Format) -> Result<()> {
        self.0.check()?;
        check_range(path, format)
    }

    fn measure(&self, layer: &Layer<'_>, found: Tensor<2>) -> f64 {
        layer.output_error(found)
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        self.0.check()?;
        let gram = layer.checked_gram()?;
        let (quantized, _) = layer.quantize(layer.weight.clone(), quantizer)?;
        let linear = Linear::new(Weight::frozen(layer.weight.clone()), None);
        let mut learned = Learned::new(Some(&self.0.lora), layer, &linear, &quantized.weight)?;
        let weight = layer.weight.clone();
        // So that learning rates mean the same for all layers.
        let energy = unless_zero(gram.energy(weight.clone()));
        let moment = gram.sum() / energy;
        let drift = gram.drift();
        let drift = drift.map(|drift| drift.transpose().matmul(weight.clone()) * (2.0 / energy));
        let loss = |learned: &Learned| {
            let error = learned.sum() - weight.clone().autodiff();
            let mut force = moment.clone().autodiff().matmul(error.clone());
            if let Some(drift) = &drift {
                force = force - drift.clone().autodiff();
            }
            (error * force).sum()
        };
        let mut optimizer = self.0.optimizer();
        let mut best: Option<(f32, usize, Learned)> = None;
        for round in 0..=self.0.rounds {
            let value = loss(&learned);
            let current = value.clone().inner().into_scalar::<f32>();
            if !current.is_finite() {
                return Err(Error::NonFinite {
                    what: "the error of the output",
                    path: layer.path.into(),
                });
            }
            if best.as_ref().is_none_or(|(least, ..)| current < *least) {
                best = Some((current, round, learned.clone()));
            }
            if round == self.0.rounds {
                break;
            }
            let mut gradients = value.backward();
            self.0.step(&mut learned, &mut optimizer, &mut gradients);
        }
        let (error, round, learned) = best.expect("the start is one");
        let start = learned.finish(layer.path, round)?;
        Ok(Start {
            plain: Some(quantized.weight),
            error: f64::from(error) * f64::from(energy),
            notes: quantized.notes,
            ..start
        })
    }
}
