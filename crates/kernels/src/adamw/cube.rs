//! CUDA, ROCm and wgpu.

use burn::backend::{DType, tensor::FloatTensor};
use burn_cubecl::CubeBackend;
use cubecl::prelude::*;

use super::{AdamwOps, AdamwStep, composed};
use crate::cube::{
    UNITS, address_type, buffer, contiguous, cubes_for, empty, position, width_of_rows,
};

impl AdamwOps for CubeBackend {
    fn adamw(
        value: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        moment_1: FloatTensor<Self>,
        moment_2: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let n = value.meta.shape().num_elements();
        if value.dtype != DType::F32 || n == 0 {
            return composed::adamw::<Self>(value, gradient, moment_1, moment_2, step);
        }
        let [value, gradient, moment_1, moment_2] =
            [value, gradient, moment_1, moment_2].map(contiguous);
        let after = [(); 3].map(|()| empty(&value, [n], DType::F32));
        let width = width_of_rows(n);
        let [of_mean, of_squares] = step.corrections();
        // SAFETY: the kernel checks its position against the number of vectors, that of each tensor.
        unsafe {
            adamw_kernel::launch_unchecked(
                &value.client,
                cubes_for(n / width),
                CubeDim::new_1d(UNITS as u32),
                address_type(&[&value]),
                width,
                buffer(&value),
                buffer(&gradient),
                buffer(&moment_1),
                buffer(&moment_2),
                buffer(&after[0]),
                buffer(&after[1]),
                buffer(&after[2]),
                n / width,
                SettingsLaunch::new(
                    step.learning_rate as f32,
                    step.kept as f32,
                    step.beta_1,
                    step.beta_2,
                    step.epsilon,
                    of_mean,
                    of_squares,
                ),
            );
        }
        let [value, moment_1, moment_2] = after;
        (value, moment_1, moment_2)
    }
}

/// The numbers of a step.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct Settings {
    learning_rate: f32,
    kept: f32,
    beta_1: f32,
    beta_2: f32,
    epsilon: f32,
    of_mean: f32,
    of_squares: f32,
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn adamw_kernel<C: Size>(
    value: &[Vector<f32, C>],
    gradient: &[Vector<f32, C>],
    moment_1: &[Vector<f32, C>],
    moment_2: &[Vector<f32, C>],
    value_after: &mut [Vector<f32, C>],
    moment_1_after: &mut [Vector<f32, C>],
    moment_2_after: &mut [Vector<f32, C>],
    vectors: usize,
    of: Settings,
) {
    let at = position();
    if at >= vectors {
        terminate!();
    }
    let one = f32::new(1.0);
    let gradient = gradient[at];
    let mean = moment_1[at] * Vector::new(of.beta_1) + gradient * Vector::new(one - of.beta_1);
    let squares =
        moment_2[at] * Vector::new(of.beta_2) + gradient * gradient * Vector::new(one - of.beta_2);
    let root = (squares / Vector::new(of.of_squares)).sqrt() + Vector::new(of.epsilon);
    let delta = mean / Vector::new(of.of_mean) / root * Vector::new(of.learning_rate);
    value_after[at] = value[at] * Vector::new(of.kept) - delta;
    moment_1_after[at] = mean;
    moment_2_after[at] = squares;
}
