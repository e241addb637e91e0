//! Matrices in `f64` for tests to compare adapters with.

use burn::tensor::Tensor;

use super::tensors::of_roundings;

/// A matrix in f64, row by row.
#[derive(Clone)]
pub(super) struct Matrix {
    pub(super) dims: [usize; 2],
    pub(super) values: Vec<f64>,
}

impl Matrix {
    pub(super) fn new(dims: [usize; 2], at: impl Fn(usize, usize) -> f64) -> Self {
        let values = (0..dims[0] * dims[1]).map(|n| at(n / dims[1], n % dims[1]));
        let values = values.collect();
        Self { dims, values }
    }

    pub(super) fn of(tensor: Tensor<2>) -> Self {
        let dims = tensor.dims();
        let values = tensor.into_data().try_into_vec::<f32>().unwrap();
        Self::new(dims, |i, j| f64::from(values[i * dims[1] + j]))
    }

    pub(super) fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.dims[1] + j]
    }

    pub(super) fn t(&self) -> Self {
        Self::new([self.dims[1], self.dims[0]], |i, j| self.at(j, i))
    }

    pub(super) fn times(&self, other: &Self) -> Self {
        assert_eq!(self.dims[1], other.dims[0]);
        Self::new([self.dims[0], other.dims[1]], |i, j| {
            (0..self.dims[1])
                .map(|k| self.at(i, k) * other.at(k, j))
                .sum()
        })
    }

    pub(super) fn plus(&self, factor: f64, other: &Self) -> Self {
        assert_eq!(self.dims, other.dims);
        Self::new(self.dims, |i, j| self.at(i, j) + factor * other.at(i, j))
    }

    pub(super) fn abs(&self) -> Self {
        Self::new(self.dims, |i, j| self.at(i, j).abs())
    }

    /// Whether `found` differs from this matrix by no more than `roundings` roundings of terms whose
    /// magnitudes add up to `magnitudes`.
    pub(super) fn is_near(&self, found: &Self, roundings: usize, magnitudes: &Self) -> bool {
        let bound = of_roundings(roundings);
        assert_eq!(self.dims, found.dims);
        assert_eq!(self.dims, magnitudes.dims);
        (self.values.iter().zip(&found.values))
            .zip(&magnitudes.values)
            .all(|((value, found), magnitude)| (value - found).abs() <= bound * magnitude)
    }
}
