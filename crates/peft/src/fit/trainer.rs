//! The loop of a training.

use std::cell::Cell;
use std::path::PathBuf;

use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Tensor};

use super::checkpoint::{self, Saver};
use super::gradients::{Totals, non_finite_parameter, origin, read, scale};
use super::identity::Identity;
use super::noise::Noise;
use super::optimizer::Optimizer;
use super::parameters::{Parameters, Values};
use super::progress::Progress;
use super::shared::{Membership, Shared, model_device};
use crate::blocks::run_blocks;
use crate::checkpointing::{backward_by_block, lowest_trained};
use crate::step::finished;
use crate::{
    Batch, Blocks, Checkpoints, Error, Evaluation, FitConfig, FitEnd, FitReport, FitWarning, Group,
    IntoControlFlow, Result, Step, Training, last_output, set_dropout,
};

/// A training but for the model that is trained.
struct Trainer<'a, L> {
    batches: &'a [Batch],
    config: &'a FitConfig,
    shared: Shared<'a>,
    /// Where what is shared is put.
    device: Device,
    loss: L,
    n_steps: usize,
    /// The lowest part with a trained parameter, if blocks are checkpointed.
    lowest: Option<usize>,
    parameters: Parameters,
    optimizer: Optimizer,
    progress: Progress,
    saver: Option<Saver<'a>>,
    warnings: Vec<FitWarning>,
}

/// [`fit_with`](crate::fit_with), and [`fit_in`](crate::fit_in).
pub(super) fn run<M: Blocks, R: IntoControlFlow>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    group: &dyn Group,
    loss: impl Fn(&M, Tensor<3>, usize) -> Tensor<1>,
    on_step: impl FnMut(&Step, &Training<'_, M>) -> R,
) -> Result<FitReport> {
    let mut membership = Membership {
        group,
        is_done: false,
    };
    let report = train(model, batches, config, group, loss, on_step)?;
    membership.is_done = true;
    Ok(report)
}

fn train<M: Blocks, R: IntoControlFlow>(
    model: &mut M,
    batches: &[Batch],
    config: &FitConfig,
    group: &dyn Group,
    loss: impl Fn(&M, Tensor<3>, usize) -> Tensor<1>,
    mut on_step: impl FnMut(&Step, &Training<'_, M>) -> R,
) -> Result<FitReport> {
    let (mut trainer, mut tuned) = Trainer::start(model, batches, config, group, loss)?;
    let first = trainer.progress.steps.len();
    let end = loop {
        if let Some(end) = trainer.end() {
            break end;
        }
        tuned = trainer.step(tuned)?;
        let steps = &trainer.progress.steps;
        let is_asked = Cell::new(false);
        let training = Training::new(&tuned, steps, &is_asked);
        let flow = on_step(&steps[steps.len() - 1], &training).into_control_flow();
        let shared = trainer.shared;
        let is_break = shared.any(flow.is_break())?;
        if shared.any(is_asked.get())? || is_break || trainer.is_save_due() {
            trainer.check_finite(&tuned)?;
            if let Err(error) = trainer.save(&tuned) {
                // What was learned is not lost with the disk.
                *model = finished(&tuned);
                return Err(error);
            }
        }
        if is_break {
            break FitEnd::Callback;
        }
    };
    let best = std::mem::take(&mut trainer.progress.best);
    tuned = best.put_into(tuned);
    trainer.check_finite(&tuned)?;
    *model = finished(&tuned);
    Ok(trainer.report(end, (first > 0).then_some(first)))
}

impl<'a, L> Trainer<'a, L> {
    /// Checks all that is given, and returns what is to be trained, after the newest checkpoint if it is
    /// resumed.
    fn start<M: Blocks>(
        model: &M,
        batches: &'a [Batch],
        config: &'a FitConfig,
        group: &'a dyn Group,
        loss: L,
    ) -> Result<(Self, M)> {
        config.check()?;
        if group.size() > config.accumulation {
            return Err(Error::Setting {
                setting: "accumulation",
                value: config.accumulation.to_string(),
                expected: "a batch for each member of the group",
            });
        }
        if batches.is_empty() {
            return Err(Error::NoBatches);
        }
        let held_out = config.evaluation.iter().flat_map(Evaluation::batches);
        let mut all = batches.iter().chain(held_out);
        all.try_for_each(|batch| batch.check(model))?;
        let mut tuned = model.clone().train();
        let parameters = Parameters::of(&tuned)?;
        let lowest = || lowest_trained(&tuned, &batches[0]);
        let mut trainer = Self {
            batches,
            config,
            shared: Shared { group },
            device: model_device(&parameters),
            loss,
            n_steps: config.n_steps(batches.len())?,
            lowest: config.checkpoint_blocks.then(lowest),
            optimizer: Optimizer::new(config, &tuned, &parameters)?,
            progress: Progress::new(config, batches.len()),
            parameters,
            saver: None,
            warnings: Vec::new(),
        };
        if let Some(evaluation) = &config.evaluation {
            let [n_shared, n_held_out] = evaluation.shared_with(batches);
            let warning = FitWarning::SharedDocuments {
                n_shared,
                n_held_out,
            };
            trainer.warnings.extend((n_shared > 0).then_some(warning));
        }
        let shared = trainer.shared;
        if config.checkpoints.is_some() || shared.has_others() {
            let parameters = &trainer.parameters;
            let training = Identity::of(
                model,
                parameters,
                batches,
                config,
                trainer.n_steps,
                group.size(),
            );
            let others = "another base, other data or other settings";
            shared.check_same(training.sha256(config.checkpoints.as_ref()), others)?;
            if let Some(checkpoints) = &config.checkpoints {
                let resumed = trainer.resume(checkpoints, training)?;
                tuned = resumed.unwrap_or_default().put_into(tuned);
            }
            if shared.has_others() {
                let start = Values::of(&tuned).sha256();
                shared.check_same(start, "other parameters that train")?;
            }
        }
        Ok((trainer, tuned))
    }

    /// Goes to the newest whole checkpoint, whose parameters it returns. One member has the directory open, and
    /// the others read the checkpoint that it chooses.
    fn resume(
        &mut self,
        checkpoints: &'a Checkpoints,
        training: Identity,
    ) -> Result<Option<Values>> {
        let shared = self.shared;
        if !shared.is_first() {
            let [number, failed] = shared.numbers([0.0; 2])?;
            if failed > 0.0 {
                return Err(Error::Group {
                    problem: "member 0 cannot use its checkpoints".into(),
                });
            }
            if number == 0.0 {
                return Ok(None);
            }
            let number = number as u64;
            let dir = checkpoint::place(checkpoints, number);
            let to = (&self.parameters, &mut self.progress, &mut self.optimizer);
            return checkpoint::read(&dir, number, &training, to).map(Some);
        }
        let open = || {
            let mut saver = Saver::open(checkpoints, training, &self.parameters)?;
            let resumed = saver.resume(
                &self.parameters,
                &mut self.progress,
                &mut self.optimizer,
                &mut self.warnings,
            )?;
            self.saver = Some(saver);
            Ok(resumed)
        };
        let resumed = open();
        let number = self.progress.steps.len() as f32;
        let failed = f32::from(u8::from(resumed.is_err()));
        shared.numbers([number, failed])?;
        resumed
    }

    /// Why there is no next step, if there is none.
    fn end(&self) -> Option<FitEnd> {
        let evaluation = self.config.evaluation.as_ref();
        let patience = evaluation.and_then(|evaluation| evaluation.schedule.patience);
        if patience.is_some_and(|patience| self.progress.notes.n_worse >= patience) {
            return Some(FitEnd::Patience);
        }
        (self.progress.steps.len() >= self.n_steps).then_some(FitEnd::LastStep)
    }

    /// Takes a step.
    fn step<M: Blocks>(&mut self, mut tuned: M) -> Result<M>
    where
        L: Fn(&M, Tensor<3>, usize) -> Tensor<1>,
    {
        let index = self.progress.steps.len();
        let chosen = self.progress.choose(self.config.accumulation);
        let n_targets: usize = chosen.iter().map(|&at| self.batches[at].n_targets()).sum();
        let (losses, gradients) = self.gradients(&mut tuned, &chosen, n_targets);
        let losses = self.shared.losses(losses, &self.device, index + 1)?;
        let (shared, parameters) = (self.shared, &self.parameters);
        let gradients = shared.gradients(&tuned, parameters, gradients, index + 1)?;
        let mut gradients = with_penalties(&tuned, gradients);
        let totals = Totals::read(&tuned, losses, &gradients, index + 1)?;
        let grad_norm = totals.grad_norm();
        let halved = 0.5f64.powi(self.progress.notes.n_skipped as i32);
        let mut step = Step {
            index: index + 1,
            n_steps: self.n_steps,
            loss: totals.losses.iter().sum(),
            grad_norm,
            learning_rate: self.config.learning_rate_at(index, self.n_steps) * halved,
            n_targets,
            held_out_loss: None,
            is_skipped: !totals.are_finite(),
        };
        if step.is_skipped {
            if self.progress.notes.n_skipped == self.config.skip_non_finite {
                return Err(self.non_finite(self.cause(&tuned, &totals, &chosen)));
            }
            self.progress.notes.n_skipped += 1;
        } else {
            self.progress.note_moved(&totals.squares);
            if let Some(max) = self.config.max_grad_norm.filter(|&max| grad_norm > max) {
                scale(&tuned, &mut gradients, max / grad_norm);
            }
            tuned = self.optimizer.step(step.learning_rate, tuned, gradients);
        }
        step.held_out_loss = self.evaluate(&tuned, step.index)?;
        self.progress.steps.push(step);
        Ok(tuned)
    }

    /// The loss of each of the batches over the targets of all, of those that are this member's, and the
    /// gradients of their sum.
    fn gradients<M: Blocks>(
        &mut self,
        tuned: &mut M,
        chosen: &[usize],
        n_targets: usize,
    ) -> (Vec<Option<Tensor<1>>>, GradientsParams)
    where
        L: Fn(&M, Tensor<3>, usize) -> Tensor<1>,
    {
        let mut accumulated = GradientsAccumulator::new();
        let mut losses = Vec::new();
        for (place, &at) in chosen.iter().enumerate() {
            let batch = &self.batches[at];
            let dropout = self.progress.next_dropout();
            let noise = Noise {
                alpha: self.config.neftune_alpha,
                seed: self.progress.next_noise(),
            };
            if !self.shared.is_mine(place) {
                losses.push(None);
                continue;
            }
            set_dropout(tuned, dropout);
            let noise = |x| noise.add(x);
            let mut part = |x: Tensor<3>| {
                let part = (self.loss)(tuned, x, at) / n_targets as f32;
                losses.push(Some(part.clone().inner()));
                part
            };
            let gradients = match self.lowest {
                Some(lowest) => backward_by_block(tuned, batch, lowest, noise, part),
                None => {
                    let positions = tuned.positions(batch.spans());
                    let x = noise(tuned.embed(batch.tokens(), &positions));
                    let part = part(run_blocks(tuned, x, &positions, |_, _| ()));
                    GradientsParams::from_grads(part.backward(), tuned)
                }
            };
            accumulated.accumulate(tuned, gradients);
        }
        (losses, accumulated.grads())
    }

    /// The loss on the held-out batches after step `step`, if it is due.
    fn evaluate<M: Blocks>(&mut self, tuned: &M, step: usize) -> Result<Option<f64>>
    where
        L: Fn(&M, Tensor<3>, usize) -> Tensor<1>,
    {
        let Some(evaluation) = &self.config.evaluation else {
            return Ok(None);
        };
        if step < self.n_steps && !step.is_multiple_of(evaluation.schedule.every) {
            return Ok(None);
        }
        // On the autodiff backend, as the loss of a training is.
        let mut model = tuned.clone().no_grad();
        set_dropout(&mut model, None);
        let held_out = evaluation.batches();
        let n_targets: usize = held_out.iter().map(Batch::n_targets).sum();
        let losses = held_out.iter().enumerate().map(|(place, batch)| {
            let at = self.batches.len() + place;
            let loss = || (self.loss)(&model, last_output(&model, batch), at);
            let is_mine = self.shared.is_mine(place);
            is_mine.then(|| loss().inner() / n_targets as f32)
        });
        let losses = self.shared.losses(losses.collect(), &self.device, step)?;
        let loss: f64 = read(losses.into_iter(), step)?.into_iter().sum();
        if !loss.is_finite() {
            return Err(self.non_finite("the loss on the held-out batches".into()));
        }
        if self.progress.evaluated(step, loss) && evaluation.schedule.restore_best {
            self.progress.best = Values::of(tuned);
            self.progress.notes.has_best = true;
        }
        Ok(Some(loss))
    }

    /// What is not finite in a step.
    fn cause<M: Blocks>(&self, tuned: &M, totals: &Totals, chosen: &[usize]) -> String {
        match totals.non_finite_gradient() {
            Some(path) if totals.losses.iter().all(|loss| loss.is_finite()) => {
                format!("the gradient of `{path}`")
            }
            _ => {
                let is_cause = |loss: &f64| !loss.is_finite();
                let part = totals.losses.iter().position(is_cause).unwrap_or(0);
                let origin = origin(tuned, &self.batches[chosen[part]]);
                format!("the loss, from {origin} on,")
            }
        }
    }

    fn check_finite<M: Blocks>(&self, tuned: &M) -> Result<()> {
        let Some(path) = non_finite_parameter(tuned) else {
            return Ok(());
        };
        Err(Error::NonFinite {
            what: format!("`{path}`"),
            step: self.progress.steps.len(),
            checkpoint: self.checkpoint(),
        })
    }

    /// The error of the step that is not taken.
    fn non_finite(&self, what: String) -> Error {
        Error::NonFinite {
            what,
            step: self.progress.steps.len() + 1,
            checkpoint: self.checkpoint(),
        }
    }

    fn checkpoint(&self) -> Option<PathBuf> {
        self.saver.as_ref().and_then(Saver::newest)
    }

    /// Whether the last step has a checkpoint of its own accord.
    fn is_save_due(&self) -> bool {
        let every = self.config.checkpoints.as_ref().map(|of| of.every);
        let is_due = |every: usize| self.progress.steps.len().is_multiple_of(every);
        every.is_some_and(|every| is_due(every) || self.end().is_some())
    }

    /// Writes a checkpoint, if there are any.
    fn save<M: Blocks>(&mut self, tuned: &M) -> Result<()> {
        let saved = match &mut self.saver {
            Some(saver) => saver.save(&Values::of(tuned), &self.progress, &self.optimizer),
            None => Ok(()),
        };
        let has_failed = self.shared.any(saved.is_err())?;
        if saved.is_ok() && has_failed {
            return Err(Error::Group {
                problem: "member 0 cannot save a checkpoint".into(),
            });
        }
        saved
    }

    fn report(self, end: FitEnd, resumed_from: Option<usize>) -> FitReport {
        let checkpoint = self.checkpoint();
        let mut warnings = self.warnings;
        let moved = &self.progress.notes.moved;
        let paths = self.parameters.0.into_keys();
        let paths: Vec<String> = paths.filter(|path| !moved.contains(path)).collect();
        if !paths.is_empty() && !self.progress.steps.is_empty() {
            warnings.push(FitWarning::NoGradient { paths });
        }
        FitReport {
            end,
            steps: self.progress.steps,
            resumed_from,
            best: self.progress.notes.best,
            checkpoint,
            warnings,
        }
    }
}

/// The gradients with those of the penalties of adapters.
fn with_penalties<M: Blocks>(tuned: &M, gradients: GradientsParams) -> GradientsParams {
    let of_adapters = tuned.linears().into_iter().filter_map(|(_, linear)| {
        let adapter = linear.adapter.as_ref();
        adapter.and_then(|adapter| adapter.ops().penalty())
    });
    let Some(penalty) = of_adapters.reduce(|sum, penalty| sum + penalty) else {
        return gradients;
    };
    let mut sums = GradientsAccumulator::new();
    sums.accumulate(tuned, gradients);
    sums.accumulate(
        tuned,
        GradientsParams::from_grads(penalty.backward(), tuned),
    );
    sums.grads()
}
