//! What the members of a group share of a training.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::parameters::Parameters;
use crate::trained::{Look, look_at_trained};
use crate::{Blocks, Error, Group, Result};

/// A group, as a training asks it.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    pub(super) group: &'a dyn Group,
}

impl Shared<'_> {
    /// Whether there are others.
    pub(super) fn has_others(&self) -> bool {
        self.group.size() > 1
    }

    /// Whether this member does what is done once.
    pub(super) fn is_first(&self) -> bool {
        self.group.rank() == 0
    }

    /// Whether this member does the work at an index of those that are dealt out.
    pub(super) fn is_mine(&self, at: usize) -> bool {
        at % self.group.size() == self.group.rank()
    }

    /// Sums numbers over the members, which are small and whole.
    pub(super) fn numbers<const N: usize>(&self, mut numbers: [f32; N]) -> Result<[f32; N]> {
        self.group.sum(&mut numbers)?;
        Ok(numbers)
    }

    /// Whether something is so for any member.
    pub(super) fn any(&self, is_so: bool) -> Result<bool> {
        let [sum] = self.numbers([f32::from(u8::from(is_so))])?;
        Ok(sum > 0.0)
    }

    /// Checks that all members have the same digest.
    ///
    /// # Errors
    /// [`Error::Group`] with the first that differs in `what`.
    pub(super) fn check_same(&self, digest: [u8; 32], what: &str) -> Result<()> {
        let (n, rank) = (digest.len(), self.group.rank());
        let mut all = vec![0.0; n * self.group.size()];
        for (to, byte) in all[n * rank..].iter_mut().zip(digest) {
            *to = f32::from(byte);
        }
        self.group.sum(&mut all)?;
        let (first, others) = all.split_at(n);
        match others.chunks(n).position(|other| other != first) {
            None => Ok(()),
            Some(at) => Err(Error::Group {
                problem: format!("member {} has {what} than member 0", at + 1),
            }),
        }
    }

    /// The losses of all members, where this one has some of them.
    ///
    /// # Errors
    /// As [`Group::sum`], and if the device fails in step `step`.
    pub(super) fn losses(
        &self,
        losses: Vec<Option<Tensor<1>>>,
        device: &Device,
        step: usize,
    ) -> Result<Vec<Tensor<1>>> {
        if !self.has_others() {
            return Ok(losses.into_iter().flatten().collect());
        }
        let n = losses.len();
        let losses = losses.into_iter().map(|loss| match loss {
            Some(loss) => loss.cast(DType::F32),
            None => Tensor::zeros([1], (device, DType::F32)),
        });
        let sums = self.sum(Tensor::cat(losses.collect(), 0), step)?;
        Ok(sums.chunk(n, 0))
    }

    /// The sums of the gradients of all members.
    ///
    /// A parameter has a gradient if it has one in any of them.
    ///
    /// # Errors
    /// As [`Shared::losses`].
    pub(super) fn gradients<M: Blocks>(
        &self,
        model: &M,
        parameters: &Parameters,
        gradients: GradientsParams,
        step: usize,
    ) -> Result<GradientsParams> {
        if !self.has_others() {
            return Ok(gradients);
        }
        let mut flat = Flat {
            gradients,
            values: BTreeMap::new(),
        };
        look_at_trained(model, &mut flat);
        let has = |path: &String| f32::from(u8::from(flat.values.contains_key(path)));
        let mut has: Vec<f32> = parameters.0.keys().map(has).collect();
        self.group.sum(&mut has)?;
        let parts = parameters.0.iter().zip(&has);
        let parts = parts.filter(|(_, has)| **has > 0.0);
        let parts: Vec<(&String, usize)> = parts
            .map(|((path, trained), _)| (path, trained.n_elements()))
            .collect();
        if parts.is_empty() {
            return Ok(GradientsParams::new());
        }
        let device = model_device(parameters);
        let values = parts
            .iter()
            .map(|&(path, n)| match flat.values.remove(path) {
                Some(values) => values.cast(DType::F32),
                None => Tensor::zeros([n], (&device, DType::F32)),
            });
        let sums = self.sum(Tensor::cat(values.collect(), 0), step)?;
        let mut first = 0;
        let mut shaped = Shaped {
            values: BTreeMap::new(),
            gradients: GradientsParams::new(),
        };
        for (path, n) in parts {
            let values = sums.clone().narrow(0, first, n);
            shaped.values.insert(path.clone(), values);
            first += n;
        }
        look_at_trained(model, &mut shaped);
        Ok(shaped.gradients)
    }

    /// Sums a tensor of `F32` over the members.
    fn sum(&self, values: Tensor<1>, step: usize) -> Result<Tensor<1>> {
        let (device, [n]) = (values.device(), values.dims());
        let values = values.try_into_data();
        let values = values.map_err(|error| Error::of_device(error, step))?;
        let mut values = values.try_into_vec::<f32>().expect("the tensor is f32");
        self.group.sum(&mut values)?;
        let sums = TensorData::new(values, [n]);
        Ok(Tensor::from_data(sums, (&device, DType::F32)))
    }
}

/// Lets the group go on without this member unless it comes to its end.
pub(super) struct Membership<'a> {
    pub(super) group: &'a dyn Group,
    pub(super) is_done: bool,
}

impl Drop for Membership<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            self.group.leave();
        }
    }
}

/// The device of the first parameter that trains.
pub(super) fn model_device(parameters: &Parameters) -> Device {
    let first = parameters.0.values().next();
    first
        .map(|trained| trained.device.clone())
        .unwrap_or_default()
}

/// Takes gradients, row by row, by path.
struct Flat {
    gradients: GradientsParams,
    values: BTreeMap<String, Tensor<1>>,
}

impl Look for Flat {
    fn look<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            let n = gradient.shape().num_elements();
            self.values.insert(path.into(), gradient.reshape([n]));
        }
    }
}

/// Gives gradients the shapes of their parameters.
struct Shaped {
    values: BTreeMap<String, Tensor<1>>,
    gradients: GradientsParams,
}

impl Look for Shaped {
    fn look<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
        if let Some(values) = self.values.remove(path) {
            let value = param.val();
            let values = values.cast(value.dtype()).reshape(value.dims());
            self.gradients.register(param.id, values);
        }
    }
}
