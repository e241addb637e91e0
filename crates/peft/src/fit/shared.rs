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
    pub(super) fn numbers(&self, numbers: &[f32], device: &Device) -> Result<Vec<f32>> {
        if !self.has_others() {
            return Ok(numbers.into());
        }
        let data = TensorData::new(numbers.to_vec(), [numbers.len()]);
        let sums = self
            .group
            .sum(Tensor::from_data(data, (device, DType::F32)))?;
        Ok(sums.into_data().try_into_vec().expect("sums are f32"))
    }

    /// Whether something is so for any member.
    pub(super) fn any(&self, is_so: bool, device: &Device) -> Result<bool> {
        let sums = self.numbers(&[f32::from(u8::from(is_so))], device)?;
        Ok(sums[0] > 0.0)
    }

    /// Checks that all members have the same digest.
    ///
    /// # Errors
    /// [`Error::Group`] with the first that differs.
    pub(super) fn check_same(&self, digest: &[u8], device: &Device) -> Result<()> {
        let (n, size) = (digest.len(), self.group.size());
        let mut all = vec![0.0; n * size];
        let own = &mut all[self.group.rank() * n..][..n];
        own.iter_mut()
            .zip(digest)
            .for_each(|(to, &byte)| *to = f32::from(byte));
        let all = self.numbers(&all, device)?;
        let (first, others) = all.split_at(n);
        let differs = others.chunks(n).position(|other| other != first);
        match differs {
            None => Ok(()),
            Some(at) => Err(Error::Group {
                problem: format!(
                    "member {} has another model, other data or other settings than member 0",
                    at + 1
                ),
            }),
        }
    }

    /// The losses of all members, where this one has some of them.
    pub(super) fn losses(
        &self,
        losses: Vec<Option<Tensor<1>>>,
        device: &Device,
    ) -> Result<Vec<Tensor<1>>> {
        if !self.has_others() {
            return Ok(losses.into_iter().flatten().collect());
        }
        let n = losses.len();
        let losses = losses.into_iter().map(|loss| match loss {
            Some(loss) => loss.cast(DType::F32),
            None => Tensor::zeros([1], (device, DType::F32)),
        });
        let sums = self.group.sum(Tensor::cat(losses.collect(), 0))?;
        Ok(sums.chunk(n, 0))
    }

    /// The sums of the gradients of all members.
    ///
    /// A parameter has a gradient if it has one in any of them.
    pub(super) fn gradients<M: Blocks>(
        &self,
        model: &M,
        parameters: &Parameters,
        gradients: GradientsParams,
    ) -> Result<GradientsParams> {
        if !self.has_others() {
            return Ok(gradients);
        }
        let mut flat = Flat {
            gradients,
            values: BTreeMap::new(),
        };
        look_at_trained(model, &mut flat);
        let device = model_device(parameters);
        let has = |path: &String| f32::from(u8::from(flat.values.contains_key(path)));
        let has: Vec<f32> = parameters.0.keys().map(has).collect();
        let has = self.numbers(&has, &device)?;
        let parts = parameters.0.iter().zip(&has);
        let parts = parts.filter(|(_, has)| **has > 0.0);
        let parts: Vec<(&String, usize)> = parts
            .map(|((path, trained), _)| (path, trained.n_elements()))
            .collect();
        if parts.is_empty() {
            return Ok(GradientsParams::new());
        }
        let values = parts
            .iter()
            .map(|&(path, n)| match flat.values.remove(path) {
                Some(values) => values.cast(DType::F32),
                None => Tensor::zeros([n], (&device, DType::F32)),
            });
        let sums = self.group.sum(Tensor::cat(values.collect(), 0))?;
        let mut first = 0;
        let mut summed = BTreeMap::new();
        for (path, n) in parts {
            summed.insert(path.clone(), sums.clone().narrow(0, first, n));
            first += n;
        }
        let mut shaped = Shaped {
            values: summed,
            gradients: GradientsParams::new(),
        };
        look_at_trained(model, &mut shaped);
        Ok(shaped.gradients)
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
