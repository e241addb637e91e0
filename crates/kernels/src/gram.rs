//! The sum of a symmetric matrix and a product of a matrix with itself.

use burn::tensor::Tensor;

/// Adds the Gram matrix of the columns of `x` to a sum of such matrices: `sum + xᵀ · x`.
///
/// On the CPU in `f32` one half of the product is computed, into the memory of `sum` if nothing else uses it,
/// and the other half is copied. On other backends and in other dtypes the operations are burn's.
///
/// # Shapes
/// - `sum`: `[d, d]`, symmetric
/// - `x`: `[n, d]`
/// - result: `[d, d]`
///
/// # Panics
/// If the shapes are not these.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use kernels::add_gram;
///
/// let device = Device::flex();
/// let x = Tensor::<2>::from_data([[1.0, 2.0], [0.0, 1.0]], &device);
/// let sum = add_gram(Tensor::zeros([2, 2], &device), x);
/// assert_eq!(sum.into_data().try_to_vec::<f32>().unwrap(), [1.0, 2.0, 2.0, 5.0]);
/// ```
pub fn add_gram(sum: Tensor<2>, x: Tensor<2>) -> Tensor<2> {
    let [_, d] = x.dims();
    assert_eq!(sum.dims(), [d, d], "the shape of the sum");
    #[cfg(feature = "flex")]
    if flex::is_native(&sum) && flex::is_native(&x) {
        return flex::add_gram(sum, x);
    }
    sum + x.clone().transpose().matmul(x)
}

#[cfg(feature = "flex")]
mod flex {
    use burn::backend::Flex;
    use burn::tensor::Tensor;
    use rayon::prelude::*;

    use crate::dense::product;
    use crate::host::{all_f32, contiguous, floats};
    use crate::matrix::Matrix;
    use crate::shared::Shared;

    /// The columns of the sum that are computed at a time.
    const PANEL: usize = 1024;
    /// The rows and the columns of a block that is copied.
    const BLOCK: usize = 64;

    /// Whether the tensor is one of the CPU in `f32`, and has no gradients.
    pub(super) fn is_native(tensor: &Tensor<2>) -> bool {
        let primitive = tensor.clone().try_into_primitive::<Flex>();
        primitive.is_ok_and(|tensor| all_f32([&tensor]))
    }

    pub(super) fn add_gram(sum: Tensor<2>, x: Tensor<2>) -> Tensor<2> {
        let [n, d] = x.dims();
        let [mut sum, x] = [sum, x].map(|tensor| {
            let tensor = tensor.try_into_primitive::<Flex>();
            contiguous(tensor.expect("a native tensor"))
        });
        let x = Matrix::new(floats(&x).as_ptr(), d, 1);
        // A copy if something else uses it.
        let values = sum.storage_mut::<f32>();
        for first in (0..d).step_by(PANEL) {
            let last = (first + PANEL).min(d);
            let dims = [last, n, last - first];
            let (left, right) = (x.transpose(), x.at(0, first));
            // SAFETY: `x` has `n` rows of `d` values, which outlive the call, and nothing writes them.
            unsafe { product(dims, left, right, &mut values[first..], d, true) };
        }
        mirror(values, d);
        Tensor::from_primitive::<Flex>(sum)
    }

    /// Copies the upper triangle of a matrix `[d, d]` to the lower one.
    fn mirror(values: &mut [f32], d: usize) {
        let shared = &Shared::new(values);
        (0..d.div_ceil(BLOCK)).into_par_iter().for_each(|block| {
            let rows = block * BLOCK..((block + 1) * BLOCK).min(d);
            for first in (0..rows.end).step_by(BLOCK) {
                for row in rows.clone() {
                    for column in first..(first + BLOCK).min(row) {
                        // SAFETY: both elements lie within the matrix. This task alone writes the rows of
                        // its block below the diagonal, and no task writes above the diagonal.
                        unsafe {
                            *shared.offset(row * d + column) = *shared.offset(column * d + row);
                        }
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::testing::Random;

    fn matrix(random: &mut Random, [rows, columns]: [usize; 2]) -> Tensor<2> {
        let values = random.floats(rows * columns, -1.0, 1.0);
        Tensor::<1>::from_floats(&values[..], &Device::flex()).reshape([rows, columns])
    }

    /// One panel and several, and an `x` stored by columns.
    #[test]
    fn the_sum_is_that_of_the_product() {
        let mut random = Random::new(3);
        for ([n, d], by_columns) in [([1, 1], false), ([3, 70], true), ([40, 1100], false)] {
            let x = match by_columns {
                true => matrix(&mut random, [d, n]).transpose(),
                false => matrix(&mut random, [n, d]),
            };
            let before = add_gram(Tensor::zeros([d, d], &Device::flex()), x.clone() * 0.5);
            let expected = before.clone() + x.clone().transpose().matmul(x.clone());
            let found = add_gram(before, x);
            let error = (found.clone() - expected).abs().max().into_scalar::<f32>();
            assert!(error <= 4e-7 * n as f32, "{error} at {n}, {d}");
            let asymmetry = (found.clone() - found.transpose()).abs().max();
            assert_eq!(asymmetry.into_scalar::<f32>(), 0.0);
        }
    }

    #[test]
    fn a_sum_that_is_in_use_is_not_changed() {
        let mut random = Random::new(4);
        let x = matrix(&mut random, [9, 30]);
        let sum = add_gram(Tensor::zeros([30, 30], &Device::flex()), x.clone());
        let before = sum.clone().into_data();
        let used = sum.clone();
        let _ = add_gram(sum, x);
        before.assert_eq(&used.into_data(), true);
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let mut random = Random::new(5);
        let x = matrix(&mut random, [50, 1300]);
        let on = |n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
            let pool = pool.build().expect("threads");
            let zeros = Tensor::zeros([1300, 1300], &Device::flex());
            let sum = pool.install(|| add_gram(zeros, x.clone()));
            sum.into_data().try_into_vec::<f32>().expect("f32")
        };
        assert!(on(1) == on(3));
    }
}
