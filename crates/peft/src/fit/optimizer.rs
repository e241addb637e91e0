//! The optimizer: a rule for each trained parameter, with its state, by path.

use std::collections::BTreeMap;

use burn::module::ParamId;
use burn::optim::Optimizer as _;
use burn::optim::{GradientsParams, Lion, LionConfig, LionState};
use burn::tensor::Tensor;
use kernels::{AdamwStep, adamw};
use quant_core::{BlockCodes, DynamicMap};
use tensor_files::{FloatType, LazyTensor, TensorFile};

use super::parameters::{Parameters, Trained, floats, read_floats};
use crate::trained::{Change, change_trained};
use crate::{Error, FitConfig, Linears, Optimizer as Kind, Result};

/// Tensors of fewer elements have their state in `f32`.
const LEAST_CODED: usize = 4096;

/// What updates the parameters, each by itself.
pub(super) struct Optimizer {
    kind: Kind,
    rules: BTreeMap<String, Rule>,
    states: BTreeMap<String, State>,
}

/// How one parameter is updated.
struct Rule {
    /// The factor of the learning rate.
    factor: f64,
    update: Update,
}

enum Update {
    AdamW(AdamW),
    Lion(Lion),
}

/// The settings of AdamW.
struct AdamW {
    weight_decay: f32,
    beta_1: f32,
    beta_2: f32,
    epsilon: f32,
}

/// What an optimizer remembers of one parameter.
struct State {
    /// The steps that it has seen.
    time: usize,
    /// One for each of [`moments`].
    moments: Vec<Moment>,
}

/// A mean of gradients or of their squares, row by row.
#[expect(
    clippy::large_enum_variant,
    reason = "there are two for each parameter, beside their tensors"
)]
enum Moment {
    Floats(Tensor<1>),
    Codes(BlockCodes),
}

/// The names of the moments with the map for their codes.
fn moments(kind: Kind) -> &'static [(&'static str, DynamicMap)] {
    match kind {
        Kind::AdamW | Kind::AdamW8bit => &[
            ("moment_1", DynamicMap::Signed),
            ("moment_2", DynamicMap::Unsigned),
        ],
        Kind::Lion => &[("momentum", DynamicMap::Signed)],
    }
}

impl Optimizer {
    /// # Errors
    /// [`Error::NoParameter`] for a group without a trained parameter.
    pub(super) fn new(
        config: &FitConfig,
        model: &impl Linears,
        parameters: &Parameters,
    ) -> Result<Self> {
        let fast: Vec<ParamId> = (model.linears().iter())
            .filter_map(|(_, linear)| linear.adapter.as_ref())
            .flat_map(|adapter| adapter.ops().fast_params())
            .collect();
        let mut groups = Vec::new();
        for group in &config.groups {
            let regex = group.regex()?;
            if !parameters.0.keys().any(|path| regex.is_match(path)) {
                return Err(Error::NoParameter {
                    pattern: group.pattern().into(),
                    paths: parameters.0.keys().take(3).cloned().collect(),
                });
            }
            groups.push((regex, group));
        }
        let rule = |(path, trained): (&String, &Trained)| {
            let group = groups.iter().find(|(regex, _)| regex.is_match(path));
            let group = group.map(|(_, group)| *group);
            let decay = group.and_then(|group| group.weight_decay);
            let of_lora_plus = match fast.contains(&trained.id) {
                true => config.lora_plus_ratio,
                false => 1.0,
            };
            let rule = Rule {
                factor: of_lora_plus * group.map_or(1.0, |group| group.rate_factor),
                update: Update::new(config, decay.unwrap_or(config.weight_decay)),
            };
            (path.clone(), rule)
        };
        Ok(Self {
            kind: config.optimizer,
            rules: parameters.0.iter().map(rule).collect(),
            states: BTreeMap::new(),
        })
    }

    /// Updates the parameters that have a gradient.
    pub(super) fn step<M: Linears>(
        &mut self,
        learning_rate: f64,
        model: M,
        gradients: GradientsParams,
    ) -> M {
        let mut step = Step {
            optimizer: self,
            learning_rate,
            gradients,
        };
        change_trained(model, &mut step)
    }

    /// The steps that each state has seen, by path.
    pub(super) fn times(&self) -> BTreeMap<String, usize> {
        let states = self.states.iter();
        states
            .map(|(path, state)| (path.clone(), state.time))
            .collect()
    }

    /// The tensors of a file, by the name of a moment and the path.
    pub(super) fn tensors(&self) -> Vec<(String, LazyTensor<'_>)> {
        let mut tensors = Vec::new();
        for (path, state) in &self.states {
            for ((name, _), moment) in moments(self.kind).iter().zip(&state.moments) {
                match moment {
                    Moment::Floats(values) => {
                        tensors.push((format!("{name}.{path}"), floats(values)))
                    }
                    Moment::Codes(codes) => {
                        let n = codes.n();
                        let n_blocks = n.div_ceil(BlockCodes::BLOCK);
                        let absmax = || codes.absmax();
                        tensors.extend([
                            (
                                format!("{name}.codes.{path}"),
                                LazyTensor::bytes([n], || codes.codes()),
                            ),
                            (
                                format!("{name}.absmax.{path}"),
                                LazyTensor::floats_as(FloatType::F32, [n_blocks], absmax),
                            ),
                        ]);
                    }
                }
            }
        }
        tensors
    }

    /// Takes the states from a file, which has those of the paths of `times`.
    ///
    /// # Errors
    /// [`tensor_files::Error`] if the file does not have a moment of a state, or another number of values.
    pub(super) fn read(
        &mut self,
        file: &mut TensorFile,
        times: &BTreeMap<String, usize>,
        parameters: &Parameters,
    ) -> Result<(), tensor_files::Error> {
        for (path, &time) in times {
            let Some(trained) = parameters.0.get(path) else {
                return Err(file.refuse(path, "is no trained parameter".into()));
            };
            let mut state = State {
                time,
                moments: Vec::new(),
            };
            for &(name, map) in moments(self.kind) {
                let moment = match self.has_codes(trained.n_elements()) {
                    false => Moment::Floats(read_floats(file, &format!("{name}.{path}"), trained)?),
                    true => {
                        let names = ["codes", "absmax"].map(|of| format!("{name}.{of}.{path}"));
                        let (codes, [n]) = file.bytes::<1>(&names[0])?;
                        let (absmax, _) = file.floats::<1>(&names[1])?;
                        trained.check_len(file, &names[0], n)?;
                        let codes = BlockCodes::new(codes, absmax, map, &trained.device);
                        let codes =
                            codes.map_err(|error| file.refuse(&names[1], error.to_string()))?;
                        Moment::Codes(codes)
                    }
                };
                state.moments.push(moment);
            }
            self.states.insert(path.clone(), state);
        }
        Ok(())
    }

    fn has_codes(&self, n_elements: usize) -> bool {
        self.kind == Kind::AdamW8bit && n_elements >= LEAST_CODED
    }
}

impl Update {
    fn new(config: &FitConfig, weight_decay: f64) -> Self {
        let [beta_1, beta_2] = [config.beta_1, config.beta_2].map(|beta| beta as f32);
        match config.optimizer {
            Kind::AdamW | Kind::AdamW8bit => Self::AdamW(AdamW {
                weight_decay: weight_decay as f32,
                beta_1,
                beta_2,
                epsilon: config.epsilon as f32,
            }),
            Kind::Lion => {
                let lion = LionConfig::new()
                    .with_weight_decay(weight_decay as f32)
                    .with_beta_1(beta_1)
                    .with_beta_2(beta_2);
                Self::Lion(lion.build())
            }
        }
    }

    /// The value after a step, and the moments, of which there are none before the first one.
    fn step(
        &self,
        rate: f64,
        value: Tensor<1>,
        gradient: Tensor<1>,
        time: usize,
        moments: Option<Vec<Tensor<1>>>,
    ) -> (Tensor<1>, Vec<Tensor<1>>) {
        let mut moments = moments.into_iter().flatten();
        match self {
            Self::AdamW(settings) => {
                let zeros = || value.zeros_like();
                let moments = moments.next().zip(moments.next());
                let (moment_1, moment_2) = moments.unwrap_or_else(|| (zeros(), zeros()));
                let step = AdamwStep {
                    learning_rate: rate,
                    kept: 1.0 - rate * f64::from(settings.weight_decay),
                    beta_1: settings.beta_1,
                    beta_2: settings.beta_2,
                    epsilon: settings.epsilon,
                    time: time as i32 + 1,
                };
                let (value, moments) = adamw(value, gradient, [moment_1, moment_2], step);
                (value, moments.into())
            }
            Self::Lion(lion) => {
                let state = moments.next().map(LionState::new);
                let (value, state) = lion.step(rate, value, gradient, state);
                let moments = state.map(|state| vec![state.momentum]);
                (value, moments.unwrap_or_default())
            }
        }
    }
}

impl Moment {
    fn values(self) -> Tensor<1> {
        match self {
            Self::Floats(values) => values,
            Self::Codes(codes) => codes.dequantize(),
        }
    }
}

struct Step<'a> {
    optimizer: &'a mut Optimizer,
    learning_rate: f64,
    gradients: GradientsParams,
}

impl Change for Step<'_> {
    fn change<const D: usize>(&mut self, path: &str, id: ParamId, value: Tensor<D>) -> Tensor<D> {
        let optimizer = &mut *self.optimizer;
        let (Some(gradient), Some(rule)) =
            (self.gradients.remove::<D>(id), optimizer.rules.get(path))
        else {
            return value;
        };
        let state = optimizer.states.remove(path);
        let time = state.as_ref().map_or(0, |state| state.time);
        let before = state.map(|state| state.moments.into_iter().map(Moment::values).collect());
        let dims = value.dims();
        let n = dims.iter().product::<usize>();
        let rate = self.learning_rate * rule.factor;
        let (value, gradient) = (value.reshape([n]), gradient.reshape([n]));
        let (value, after) = rule.update.step(rate, value, gradient, time, before);
        let maps = moments(optimizer.kind).iter();
        let has_codes = optimizer.has_codes(n);
        let after = after
            .into_iter()
            .zip(maps)
            .map(|(moment, &(_, map))| match has_codes {
                true => Moment::Codes(BlockCodes::quantize(moment, map)),
                false => Moment::Floats(moment),
            });
        let state = State {
            time: time + 1,
            moments: after.collect(),
        };
        optimizer.states.insert(path.into(), state);
        value.reshape(dims)
    }
}

#[cfg(test)]
mod tests {
    use burn::optim::AdamWConfig;
    use burn::tensor::{Device, Distribution};

    use super::*;

    /// The bits of burn's optimizer, whose operations are separate.
    #[test]
    fn a_step_of_adamw_is_that_of_burn() {
        for weight_decay in [0.0, 0.1] {
            compare_with_burn(weight_decay);
        }
    }

    fn compare_with_burn(weight_decay: f64) {
        let device = Device::flex();
        device.seed(3);
        let random = || Tensor::<1>::random([301], Distribution::Normal(0.0, 1.0), &device);
        let config = FitConfig::new().with_weight_decay(weight_decay);
        let update = Update::new(&config, config.weight_decay);
        let reference = AdamWConfig::new()
            .with_weight_decay(config.weight_decay as f32)
            .with_beta_1(config.beta_1 as f32)
            .with_beta_2(config.beta_2 as f32)
            .with_epsilon(config.epsilon as f32)
            .build();
        let (mut value, mut moments) = (random(), None);
        let (mut expected, mut state) = (value.clone(), None);
        for time in 0..5 {
            let (rate, gradient) = (0.01 / (1.0 + time as f64), random());
            let (next, after) = update.step(rate, value, gradient.clone(), time, moments);
            (value, moments) = (next, Some(after));
            (expected, state) = reference.step(rate, expected, gradient, state);
            value.to_data().assert_eq(&expected.to_data(), true);
        }
    }
}
