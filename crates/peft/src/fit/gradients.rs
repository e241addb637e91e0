//! What a step reads of its losses and gradients.

use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData, Transaction};

use crate::blocks::run_blocks;
use crate::trained::{Look, look_at_trained};
use crate::{Batch, Blocks, Error, Result};

/// The losses and the gradients of a step.
pub(super) struct Totals {
    /// The loss of each batch, over the targets of all.
    pub(super) losses: Vec<f64>,
    /// The square of the norm of each gradient, by the path of its parameter.
    pub(super) squares: Vec<(String, f64)>,
}

impl Totals {
    /// Reads them in one operation, because a read waits for all that the device has to do.
    pub(super) fn read<M: Blocks>(
        model: &M,
        losses: Vec<Tensor<1>>,
        gradients: &GradientsParams,
        step: usize,
    ) -> Result<Self> {
        let mut norms = Norms {
            gradients,
            squares: Vec::new(),
        };
        look_at_trained(model, &mut norms);
        let n_losses = losses.len();
        let (paths, squares): (Vec<String>, Vec<Tensor<1>>) = norms.squares.into_iter().unzip();
        let mut values = read(losses.into_iter().chain(squares), step)?.into_iter();
        Ok(Self {
            losses: values.by_ref().take(n_losses).collect(),
            squares: paths.into_iter().zip(values).collect(),
        })
    }

    /// The norm of all gradients together.
    pub(super) fn grad_norm(&self) -> f64 {
        let squares = self.squares.iter().map(|(_, square)| square);
        squares.fold(0.0, |sum, square| sum + square).sqrt()
    }

    pub(super) fn are_finite(&self) -> bool {
        self.losses.iter().all(|loss| loss.is_finite()) && self.non_finite_gradient().is_none()
    }

    /// The parameter whose gradient is not finite, if there is one.
    pub(super) fn non_finite_gradient(&self) -> Option<&str> {
        let mut squares = self.squares.iter();
        let (path, _) = squares.find(|(_, square)| !square.is_finite())?;
        Some(path)
    }
}

/// The values of scalars.
pub(super) fn read(scalars: impl Iterator<Item = Tensor<1>>, step: usize) -> Result<Vec<f64>> {
    let values = scalars.fold(Transaction::default(), Transaction::register);
    let values = values.try_execute();
    let value = |data: TensorData| {
        let value = data.convert::<f32>().try_into_vec::<f32>().expect("floats");
        f64::from(value[0])
    };
    let values = values.map_err(|error| Error::of_device(error, step))?;
    Ok(values.into_iter().map(value).collect())
}

struct Norms<'a> {
    gradients: &'a GradientsParams,
    squares: Vec<(String, Tensor<1>)>,
}

impl Look for Norms<'_> {
    fn look<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.squares.push((path.into(), gradient.square().sum()));
        }
    }
}

/// Multiplies all gradients.
pub(super) fn scale<M: Blocks>(model: &M, gradients: &mut GradientsParams, factor: f64) {
    look_at_trained(model, &mut Scale { gradients, factor });
}

struct Scale<'a> {
    gradients: &'a mut GradientsParams,
    factor: f64,
}

impl Look for Scale<'_> {
    fn look<const D: usize>(&mut self, _: &str, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            self.gradients.register(param.id, gradient * self.factor);
        }
    }
}

/// The first part of a model whose output for a batch is not finite: a trained parameter, or else a part
/// of the forward pass.
pub(super) fn origin<M: Blocks>(model: &M, batch: &Batch) -> String {
    if let Some(path) = non_finite_parameter(model) {
        return format!("the parameter `{path}`");
    }
    let is_finite = |x: &Tensor<3>| x.clone().inner().is_finite().all().into_scalar::<bool>();
    let mut first = None;
    let model = model.clone().no_grad();
    let positions = model.positions(batch.spans());
    let x = model.embed(batch.tokens(), &positions);
    let x = run_blocks(&model, x, &positions, |index, x| {
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

/// The path of a trained parameter that is not finite, if there is one.
pub(super) fn non_finite_parameter<M: Blocks>(model: &M) -> Option<String> {
    let mut finite = Finite::default();
    look_at_trained(model, &mut finite);
    finite.non_finite
}

#[derive(Default)]
struct Finite {
    non_finite: Option<String>,
}

impl Look for Finite {
    fn look<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        if self.non_finite.is_none() {
            let values = param.val().inner();
            if !values.is_finite().all().into_scalar::<bool>() {
                self.non_finite = Some(path.into());
            }
        }
    }
}
