//! Training: `trainer` is the loop, `progress` says where it is, and `checkpoint` holds its files.

use burn::tensor::Tensor;

use crate::{
    Alone, Batch, Blocks, CausalLm, Evaluation, FitConfig, FitReport, Group, IntoControlFlow,
    Result, Step, Training, nll_of_output,
};

mod checkpoint;
mod gradients;
mod identity;
mod noise;
mod optimizer;
mod parameters;
mod progress;
mod shared;
mod trainer;

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
/// last step. The [`FitReport`] says why it ended, and what may be wrong.
///
/// With [`FitConfig::with_checkpoints`] the training is saved on the way and can be resumed, also one that
/// the callback has ended: the parameters, losses and random numbers are then those of a training that was
/// not interrupted. With [`FitConfig::with_evaluation`] there are losses on held-out batches, which can end
/// it.
///
/// # Errors
/// * before the first step: [`Error::Setting`](crate::Error::Setting),
///   [`Error::NoBatches`](crate::Error::NoBatches), [`Error::Token`](crate::Error::Token),
///   [`Error::TooLong`](crate::Error::TooLong), [`Error::NothingToTrain`](crate::Error::NothingToTrain) or
///   [`Error::TrainsIn16Bits`](crate::Error::TrainsIn16Bits);
/// * with checkpoints, [`Error::OtherTraining`](crate::Error::OtherTraining) if the newest is of another
///   training, [`Error::NotSaved`](crate::Error::NotSaved) for a parameter that they do not hold, and
///   [`Error::File`](crate::Error::File) if another process uses the directory, it cannot be used, or all
///   checkpoints are damaged;
/// * [`Error::NonFinite`](crate::Error::NonFinite) if the loss, a gradient or a result is NaN or infinite;
/// * [`Error::OutOfMemory`](crate::Error::OutOfMemory) or [`Error::Device`](crate::Error::Device) if the
///   device reports a failure when a loss or a gradient is read.
///
/// On an error the model is unchanged, with one exception: if a checkpoint cannot be written, for want of
/// room on the disk for instance, the model has what it has learned so far, and the checkpoints written
/// before are whole.
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
///         self.embedding.val().transpose().into()
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
/// let report = peft::fit(&mut model, &batches, &config, |step, _| losses.push(step.loss))?;
/// assert!(losses[19] < losses[0]);
/// assert_eq!((report.steps.len(), report.warnings), (20, Vec::new()));
/// let error = peft::fit(&mut model, &[], &config, |_, _| {}).unwrap_err();
/// assert_eq!(error.to_string(), "there are no batches to train on");
/// # Ok::<(), peft::Error>(())
/// ```
///
/// Ends when the loss on held-out text does not fall any more, and goes on where it was stopped:
///
/// ```
/// # use peft::{Batch, CausalLm, Checkpoints, Error, Evaluation, FitConfig, FitReport};
/// use std::ops::ControlFlow;
///
/// fn tune<M: CausalLm>(
///     model: &mut M,
///     batches: &[Batch],
///     held_out: &[Batch],
///     is_stopped: impl Fn() -> bool,
/// ) -> Result<FitReport, Error> {
///     let evaluation = Evaluation::new(held_out).with_every(10).with_patience(2);
///     let checkpoints = Checkpoints::new("run/checkpoints").with_every(50).with_resume(true);
///     let config = FitConfig::new()
///         .with_evaluation(evaluation.with_restore_best(true))
///         .with_checkpoints(checkpoints);
///     // Stopped by a signal, for instance, it leaves a checkpoint of the last step.
///     peft::fit(model, batches, &config, |_, _| match is_stopped() {
///         true => ControlFlow::Break(()),
///         false => ControlFlow::Continue(()),
///     })
/// }
/// ```
pub fn fit<M: CausalLm, R: IntoControlFlow>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    on_step: impl FnMut(&Step, &Training<'_, M>) -> R,
) -> Result<FitReport> {
    fit_in(model, batches, config, &Alone, on_step)
}

/// Trains as [`fit`] does, together with the other members of a group: data parallelism.
///
/// Each member has the same model and calls it with the same batches and settings. The batches of a step,
/// [`FitConfig::with_accumulation`] of them, are dealt out in turn, as are the held-out ones; the gradients of
/// what trains are summed over the members before they are clipped, and each member takes the same step. The
/// result is that of one member but for the order of the sums, which is the same for two members and two
/// batches.
///
/// The first member writes checkpoints; the others read them when a training is resumed, from the same
/// directory. The callback is called by each, and if one breaks off, all do.
///
/// # Errors
/// [`Error::Setting`](crate::Error::Setting) if a step has fewer batches than the group members;
/// [`Error::Group`](crate::Error::Group) if a member has another model, other data or other settings, has
/// left, or cannot use its checkpoints; otherwise as [`fit`].
///
/// # Examples
/// ```no_run
/// # use peft::{Batch, CausalLm, Error, FitConfig, Threads};
/// /// Trains copies of a model on two threads, which might have a device each.
/// fn tune<M: CausalLm>(models: [M; 2], batches: &[Batch]) -> Result<(), Error> {
///     let config = FitConfig::new().with_accumulation(2);
///     std::thread::scope(|scope| {
///         let members = Threads::new(2).into_iter().zip(models);
///         let threads: Vec<_> = members
///             .map(|(member, mut model)| {
///                 let config = &config;
///                 scope.spawn(move || {
///                     peft::fit_in(&mut model, batches, config, &member, |_, _| {}).map(drop)
///                 })
///             })
///             .collect();
///         let mut threads = threads.into_iter();
///         threads.try_for_each(|thread| thread.join().expect("no panic"))
///     })
/// }
/// ```
pub fn fit_in<M: CausalLm, R: IntoControlFlow>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    group: &dyn Group,
    on_step: impl FnMut(&Step, &Training<'_, M>) -> R,
) -> Result<FitReport> {
    let held_out = config
        .evaluation
        .as_ref()
        .map_or(&[][..], Evaluation::batches);
    let loss = |model: &M, x, at: usize| {
        let batch = batches
            .get(at)
            .unwrap_or_else(|| &held_out[at - batches.len()]);
        batch.of_targets(nll_of_output(model, x, batch)).sum()
    };
    trainer::run(model, batches, config, group, loss, on_step)
}

/// Trains as [`fit`] does, on another loss.
///
/// `loss(model, x, at)` is the loss of `batches[at]`, a scalar: the sum over the batch's targets, where
/// `x`, `[batch, seq, hidden]`, is the output of the model's last block. The loss of a step is the sum of
/// those of its batches, divided by their number of targets ([`Batch::n_targets`]). The held-out batches of
/// an [`Evaluation`] are counted on after those of the training: the first one is `at == batches.len()`.
///
/// A checkpoint does not know the loss: whoever resumes a training gives the same.
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
    on_step: impl FnMut(&Step, &Training<'_, M>) -> R,
) -> Result<FitReport> {
    trainer::run(model, batches, config, &Alone, loss, on_step)
}
