use burn::module::{ModuleVisitor, Param, ParamId};
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams};
use burn::tensor::{DType, Tensor, TensorData, Transaction};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::blocks::run_blocks;
use crate::checkpointing::{backward_by_block, lowest_trained};
use crate::{
    Batch, Blocks, CausalLm, Error, FitConfig, IntoControlFlow, Result, Step, Training,
    last_output, nll_of_output, set_dropout,
};

/// Trains the parameters that are not frozen, by AdamW on the next-token loss.
///
/// A step's gradient is that of the mean loss over the targets of its batches, however they are
/// split. The batches are shuffled anew for each epoch.
///
/// A learning rate that is too high may ruin a model without an infinity: the losses of the last steps
/// are then above those of the first ones.
///
/// `on_step` is called after each step with the [`Step`] and the model as it is then
/// ([`Training::model`]). If it returns [`ControlFlow::Break`](std::ops::ControlFlow::Break), the
/// training ends, and the model keeps what it has learned; a closure that returns nothing goes on to the
/// last step.
///
/// # Errors
/// [`Error::Setting`], [`Error::NoBatches`], [`Error::Token`], [`Error::TooLong`] or
/// [`Error::NothingToTrain`] or [`Error::TrainsIn16Bits`] before the first step; [`Error::NonFinite`] if
/// the loss, a gradient or a result is NaN or infinite; [`Error::OutOfMemory`] or [`Error::Device`] if the
/// device reports a failure when a loss or a gradient is read. On an error the model is unchanged.
///
/// # Examples
/// ```
/// use burn::module::{Module, Param};
/// use burn::tensor::{Device, Int, Tensor};
/// use peft::{Batch, Blocks, CausalLm, FitConfig, Head, Linear, Linears, Lora, Spans, Weight};
///
/// /// Predicts each token from the one before it.
/// #[derive(Module, Debug)]
/// struct Bigram {
///     embedding: Param<Tensor<2>>,
///     proj: Linear,
/// }
///
/// impl Linears for Bigram {
///     fn linears(&self) -> Vec<(String, &Linear)> {
///         vec![("proj".into(), &self.proj)]
///     }
///
///     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
///         vec![("proj".into(), &mut self.proj)]
///     }
/// }
///
/// impl Blocks for Bigram {
///     type Positions = ();
///
///     fn vocab_size(&self) -> usize {
///         4
///     }
///
///     fn n_blocks(&self) -> usize {
///         1
///     }
///
///     fn positions(&self, _: &Spans) {}
///
///     fn embed(&self, tokens: Tensor<2, Int>, (): &()) -> Tensor<3> {
///         let [batch, seq] = tokens.dims();
///         let x = self.embedding.val().select(0, tokens.reshape([batch * seq]));
///         x.reshape([batch, seq, 4])
///     }
///
///     fn block(&self, _: usize, x: Tensor<3>, (): &()) -> Tensor<3> {
///         self.proj.forward(x)
///     }
/// }
///
/// impl CausalLm for Bigram {
///     fn norm(&self, x: Tensor<3>) -> Tensor<3> {
///         x
///     }
///
///     fn head(&self) -> Head<'_> {
///         Head::Dense(self.embedding.val().transpose())
///     }
/// }
///
/// let eye = Tensor::<2>::eye(4, &Device::flex());
/// let mut model = Bigram {
///     embedding: Param::from_tensor(eye.clone() * 2.0).set_require_grad(false),
///     proj: Linear::new(Weight::frozen(eye), None),
/// };
/// peft::attach(&mut model, &Lora::new(2))?;
///
/// let tokens = Tensor::<2, Int>::from_data([[0, 1, 2, 3, 0, 1, 2, 3]], &Device::flex());
/// let batches = [Batch::new(tokens)?];
/// let config = FitConfig::new().with_learning_rate(0.1).with_steps(20);
/// let mut losses = Vec::new();
/// peft::fit(&mut model, &batches, &config, |step, _| losses.push(step.loss))?;
/// assert!(losses[19] < losses[0]);
/// let error = peft::fit(&mut model, &[], &config, |_, _| {}).unwrap_err();
/// assert_eq!(error.to_string(), "there are no batches to train on");
/// # Ok::<(), peft::Error>(())
/// ```
///
/// Ends when the loss on held-out text does not fall any more:
///
/// ```
/// # use peft::{Batch, CausalLm, FitConfig};
/// use std::ops::ControlFlow;
///
/// fn tune<M: CausalLm>(
///     model: &mut M,
///     batches: &[Batch],
///     held_out: &Batch,
/// ) -> Result<(), peft::Error> {
///     let mut least = f32::INFINITY;
///     peft::fit(model, batches, &FitConfig::new(), |step, training| {
///         if step.index % 10 == 0 {
///             let loss = peft::token_nll(&training.model(), held_out).sum();
///             let loss = loss.into_scalar::<f32>();
///             if loss >= least {
///                 return ControlFlow::Break(());
///             }
///             least = loss;
///         }
///         ControlFlow::Continue(())
///     })
/// }
/// ```
pub fn fit<M: CausalLm, R: IntoControlFlow>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    on_step: impl FnMut(&Step, &Training<'_, M>) -> R,
) -> Result<()> {
    let loss = |model: &M, x, at: usize| {
        let batch = &batches[at];
        batch.of_targets(nll_of_output(model, x, batch)).sum()
    };
    fit_with(model, batches, config, loss, on_step)
}

/// Trains as [`fit`] does, on another loss.
///
/// `loss(model, x, at)` is the loss of `batches[at]`, a scalar: the sum over the batch's targets, where
/// `x`, `[batch, seq, hidden]`, is the output of the model's last block. The loss of a step is the sum of
/// those of its batches, divided by their number of targets ([`Batch::n_targets`]).
///
/// # Errors
/// As [`fit`].
///
/// # Examples
/// A classifier, whose logits are the output of the last block for the last token.
///
/// ```
/// # use burn::module::{Module, Param};
/// # use burn::tensor::{Device, Int, Tensor};
/// # use peft::{Batch, Blocks, FitConfig, Linear, Linears, Lora, Spans, Weight};
/// #
/// # #[derive(Module, Debug)]
/// # struct Bigram {
/// #     embedding: Param<Tensor<2>>,
/// #     proj: Linear,
/// # }
/// #
/// # impl Linears for Bigram {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![("proj".into(), &self.proj)]
/// #     }
/// #
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![("proj".into(), &mut self.proj)]
/// #     }
/// # }
/// #
/// # impl Blocks for Bigram {
/// #     type Positions = ();
/// #
/// #     fn vocab_size(&self) -> usize {
/// #         4
/// #     }
/// #
/// #     fn n_blocks(&self) -> usize {
/// #         1
/// #     }
/// #
/// #     fn positions(&self, _: &Spans) {}
/// #
/// #     fn embed(&self, tokens: Tensor<2, Int>, (): &()) -> Tensor<3> {
/// #         let [batch, seq] = tokens.dims();
/// #         let x = self.embedding.val().select(0, tokens.reshape([batch * seq]));
/// #         x.reshape([batch, seq, 4])
/// #     }
/// #
/// #     fn block(&self, _: usize, x: Tensor<3>, (): &()) -> Tensor<3> {
/// #         self.proj.forward(x)
/// #     }
/// # }
/// # let eye = Tensor::<2>::eye(4, &Device::flex());
/// # let mut model = Bigram {
/// #     embedding: Param::from_tensor(eye.clone() * 2.0).set_require_grad(false),
/// #     proj: Linear::new(Weight::frozen(eye), None),
/// # };
/// # peft::attach(&mut model, &Lora::new(2))?;
/// use burn::tensor::activation::log_softmax;
///
/// let tokens = Tensor::<2, Int>::from_data([[0, 1, 2], [3, 1, 1]], &Device::flex());
/// let labels = Tensor::<2>::from_floats([[0., 0., 0., 1.], [1., 0., 0., 0.]], &Device::flex());
/// // One target for each sequence: the token whose output is classified.
/// let is_last = [false, false, true, false, false, true];
/// let batches = [Batch::new(tokens)?.with_targets(&is_last)?];
/// let loss = |_: &Bigram, x: Tensor<3>, _: usize| {
///     let logits = x.slice([0..2, 2..3, 0..4]).reshape([2, 4]);
///     (log_softmax(logits, 1) * labels.clone().autodiff()).sum().neg()
/// };
/// let config = FitConfig::new().with_learning_rate(0.1).with_steps(20);
/// let mut losses = Vec::new();
/// peft::fit_with(&mut model, &batches, &config, loss, |step, _| losses.push(step.loss))?;
/// assert!(losses[19] < losses[0]);
/// # Ok::<(), peft::Error>(())
/// ```
pub fn fit_with<M: Blocks, R: IntoControlFlow>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    loss: impl Fn(&M, Tensor<3>, usize) -> Tensor<1>,
    mut on_step: impl FnMut(&Step, &Training<'_, M>) -> R,
) -> Result<()> {
    config.check()?;
    if batches.is_empty() {
        return Err(Error::NoBatches);
    }
    batches.iter().try_for_each(|batch| batch.check(model))?;
    let mut tuned = model.clone().train();
    let mut trainable = Trainable::default();
    tuned.visit(&mut trainable);
    if trainable.n == 0 {
        return Err(Error::NothingToTrain);
    }
    if let Some((path, found)) = trainable.of_16_bits {
        return Err(Error::TrainsIn16Bits { path, found });
    }
    let per_epoch = batches.len().div_ceil(config.accumulation);
    let n_steps = config
        .steps
        .unwrap_or(config.epochs.saturating_mul(per_epoch));
    if config.warmup_steps > n_steps {
        return Err(Error::Setting {
            setting: "warmup_steps",
            value: config.warmup_steps.to_string(),
            expected: "no more than the steps",
        });
    }

    let adamw = AdamWConfig::new()
        .with_weight_decay(config.weight_decay as f32)
        .with_beta_1(config.beta_1 as f32)
        .with_beta_2(config.beta_2 as f32)
        .with_epsilon(config.epsilon as f32);
    // AdamW updates each parameter by itself: two of them are one with two learning rates.
    let (mut optimizer, mut fast_optimizer) = (adamw.init(), adamw.init());
    let fast: Vec<ParamId> = match config.lora_plus_ratio {
        1.0 => Vec::new(),
        _ => (tuned.linears().iter())
            .filter_map(|(_, linear)| linear.adapter.as_ref())
            .flat_map(|adapter| adapter.ops().fast_params())
            .collect(),
    };
    let lowest = config
        .checkpoint_blocks
        .then(|| lowest_trained(&tuned, &batches[0]));
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    let mut masks = rng.clone();
    masks.set_stream(1);
    let mut order: Vec<usize> = (0..batches.len()).collect();
    let mut last = 0;
    for index in 0..n_steps {
        if index % per_epoch == 0 {
            order.shuffle(&mut rng);
        }
        let first = index % per_epoch * config.accumulation;
        let chosen = &order[first..order.len().min(first + config.accumulation)];
        let n_targets: usize = chosen.iter().map(|&at| batches[at].n_targets()).sum();

        let mut accumulated = GradientsAccumulator::new();
        let mut losses = Vec::new();
        for &at in chosen {
            let batch = &batches[at];
            set_dropout(&mut tuned, masks.next_u64());
            let mut part = |x: Tensor<3>| {
                let part = loss(&tuned, x, at) / n_targets as f32;
                losses.push(part.clone().inner());
                part
            };
            let gradients = match lowest {
                Some(lowest) => backward_by_block(&tuned, batch, lowest, part),
                None => {
                    let part = part(last_output(&tuned, batch));
                    GradientsParams::from_grads(part.backward(), &tuned)
                }
            };
            accumulated.accumulate(&tuned, gradients);
        }
        let of_adapters = tuned.linears().into_iter().filter_map(|(_, linear)| {
            let adapter = linear.adapter.as_ref();
            adapter.and_then(|adapter| adapter.ops().penalty())
        });
        if let Some(penalty) = of_adapters.reduce(|sum, penalty| sum + penalty) {
            let gradients = GradientsParams::from_grads(penalty.backward(), &tuned);
            accumulated.accumulate(&tuned, gradients);
        }
        let mut gradients = accumulated.grads();
        let totals = totals(&tuned, losses, &gradients, index + 1)?;
        if let Some(part) = totals.losses.iter().position(|loss| !loss.is_finite()) {
            return Err(Error::NonFinite {
                what: format!(
                    "the loss, from {} on,",
                    origin(&tuned, &batches[chosen[part]])
                ),
                step: index + 1,
            });
        }
        let non_finite = |(_, square): &&(String, f64)| !square.is_finite();
        if let Some((path, _)) = totals.squares.iter().find(non_finite) {
            return Err(Error::NonFinite {
                what: format!("the gradient of `{path}`"),
                step: index + 1,
            });
        }
        let squares = totals.squares.iter().map(|(_, square)| square);
        let grad_norm = squares.fold(0.0, |sum, square| sum + square).sqrt();
        if let Some(max) = config.max_grad_norm.filter(|&max| grad_norm > max) {
            let factor = max / grad_norm;
            tuned.visit(&mut Scale {
                gradients: &mut gradients,
                factor,
            });
        }
        let learning_rate = config.learning_rate_at(index, n_steps);
        if !fast.is_empty() {
            let mut split = Split {
                fast: &fast,
                gradients: &mut gradients,
                taken: GradientsParams::new(),
            };
            tuned.visit(&mut split);
            let fast_rate = learning_rate * config.lora_plus_ratio;
            tuned = fast_optimizer.step(fast_rate, tuned, split.taken);
        }
        tuned = optimizer.step(learning_rate, tuned, gradients);
        last = index + 1;
        let step = Step {
            index: last,
            n_steps,
            loss: totals.losses.iter().sum(),
            grad_norm,
            learning_rate,
            n_targets,
        };
        let flow = on_step(&step, &Training::new(&tuned)).into_control_flow();
        if flow.is_break() {
            break;
        }
    }
    let mut finite = Finite::default();
    tuned.visit(&mut finite);
    if let Some(path) = finite.non_finite {
        return Err(Error::NonFinite {
            what: format!("`{path}`"),
            step: last,
        });
    }
    *model = Training::new(&tuned).model();
    Ok(())
}

/// Counts the parameters that are not frozen.
#[derive(Default)]
struct Trainable {
    n: usize,
    path: Vec<String>,
    /// The first that does not hold small steps.
    of_16_bits: Option<(String, DType)>,
}

impl ModuleVisitor for Trainable {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_require_grad() {
            return;
        }
        self.n += 1;
        let dtype = param.val().dtype();
        if matches!(dtype, DType::F16 | DType::BF16) {
            let found = (self.path.join("."), dtype);
            self.of_16_bits.get_or_insert(found);
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// What a step reads of the device.
struct Totals {
    /// The loss of each batch, over the targets of all.
    losses: Vec<f64>,
    /// The square of the norm of each gradient, by the path of its parameter.
    squares: Vec<(String, f64)>,
}

/// Reads the totals of a step in one operation, because a read waits for all that the device has to do.
fn totals<M: Blocks>(
    model: &M,
    losses: Vec<Tensor<1>>,
    gradients: &GradientsParams,
    step: usize,
) -> Result<Totals> {
    let mut norms = Norms {
        gradients,
        path: Vec::new(),
        squares: Vec::new(),
    };
    model.visit(&mut norms);
    let n_losses = losses.len();
    let (paths, squares): (Vec<String>, Vec<Tensor<1>>) = norms.squares.into_iter().unzip();
    let all = losses.into_iter().chain(squares);
    let read = all.fold(Transaction::default(), Transaction::register);
    let values = read.try_execute();
    let values = values
        .map_err(|error| Error::of_device(error, step))?
        .into_iter();
    let value = |data: TensorData| {
        let value = data.convert::<f32>().try_into_vec::<f32>().expect("floats");
        f64::from(value[0])
    };
    let mut values = values.map(value);
    Ok(Totals {
        losses: values.by_ref().take(n_losses).collect(),
        squares: paths.into_iter().zip(values).collect(),
    })
}

struct Norms<'a> {
    gradients: &'a GradientsParams,
    path: Vec<String>,
    squares: Vec<(String, Tensor<1>)>,
}

impl ModuleVisitor for Norms<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            let path = self.path.join(".");
            self.squares.push((path, gradient.square().sum()));
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// The first part of a model whose output for a batch is not finite: a trained parameter, or else a part
/// of the forward pass.
fn origin<M: Blocks>(model: &M, batch: &Batch) -> String {
    let mut finite = Finite::default();
    model.visit(&mut finite);
    if let Some(path) = finite.non_finite {
        return format!("the parameter `{path}`");
    }
    let is_finite = |x: &Tensor<3>| x.clone().inner().is_finite().all().into_scalar::<bool>();
    let mut first = None;
    let model = model.clone().no_grad();
    let positions = model.positions(batch.spans());
    let x = run_blocks(&model, batch.tokens(), &positions, |index, x| {
        if first.is_none() && !is_finite(x) {
            first = Some(index);
        }
    });
    match first.or_else(|| (!is_finite(&x)).then(|| model.n_blocks())) {
        Some(0) => "the embedding".into(),
        Some(next) => format!("block {}", next - 1),
        None => "what follows the last block".into(),
    }
}

/// Finds a trained parameter that is not finite.
#[derive(Default)]
struct Finite {
    path: Vec<String>,
    non_finite: Option<String>,
}

impl ModuleVisitor for Finite {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.is_require_grad() && self.non_finite.is_none() {
            let values = param.val().inner();
            if values.is_finite().all().into_scalar::<bool>() {
                return;
            }
            self.non_finite = Some(self.path.join("."));
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// Multiplies all gradients.
struct Scale<'a> {
    gradients: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            self.gradients.register(param.id, gradient * self.factor);
        }
    }
}

/// Takes the gradients of some parameters.
struct Split<'a> {
    fast: &'a [ParamId],
    gradients: &'a mut GradientsParams,
    taken: GradientsParams,
}

impl ModuleVisitor for Split<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.fast.contains(&param.id)
            && let Some(gradient) = self.gradients.remove::<D>(param.id)
        {
            self.taken.register(param.id, gradient);
        }
    }
}
